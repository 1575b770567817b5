"""Before a run: every record's length, everything that is wrong, and what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.dataset import RecordDataset
from train.order import GroupedSampler
from train.survey import Limits, Samples, Survey, part_of, survey
from vlm.checkpoint import load_checkpoint
from vlm.errors import RecordError
from vlm.messages import Record, assistant, user
from vlm.processor import Processor


@pytest.fixture(scope="module")
def processor(llava: str) -> Processor:
    return load_checkpoint(llava)[1]


def line(number: int, *turns: tuple[str, str], pictures: int = 0) -> str:
    """A record as JSON; its pictures, which do not exist, are in its first question."""
    messages = []
    for place, (question, answer) in enumerate(turns):
        shown = [{"type": "image"}] * (pictures if place == 0 else 0)
        content = [*shown, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        if answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    images = [f"{number}-{i}.png" for i in range(pictures)]
    return json.dumps({"id": str(number), "images": images, "messages": messages})


@pytest.fixture
def records(tmp_path: Path) -> Callable[..., RecordDataset]:
    def make(*lines: str) -> RecordDataset:
        path = tmp_path / "records.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return RecordDataset([path])

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_those_of_the_processor_and_no_picture_is_opened(
    records: Callable[..., RecordDataset], processor: Processor, workers: int
) -> None:
    data = records(
        line(0, ("what?", "a dog"), pictures=1),
        line(1, ("and this?", "two cats of four"), ("where?", "up"), pictures=2),
        line(2, ("no picture", "none")),
    )
    found = survey(data, processor, Limits(10_000, "error"), num_workers=workers)
    plain = [len(processor.encode_ids(data[i].messages)[0]) for i in range(3)]
    assert found.length.tolist() == plain
    assert plain[1] - 2 * processor.num_visual_tokens > 0
    assert found.last_turn.tolist() == [1, 2, 1]
    assert found.num_pictures == 2 and found.picture[2] == 0
    samples = Samples(data, found)
    assert [samples[i] for i in range(3)] == [data[i] for i in range(3)]


def test_everything_that_is_wrong_is_told_at_once(
    records: Callable[..., RecordDataset], processor: Processor
) -> None:
    good = line(0, ("what?", "a dog"))
    torn = '{"id": "1", "images": ["a.png"], "messages": [{"role": "user", "content": "hm"}]}'
    data = records(good, "not json", torn, line(7, ("what?", "")), line(8, ("long", "x" * 300)))
    with pytest.raises(RecordError) as told:
        survey(data, processor, Limits(200, "error"))
    text = str(told.value)
    assert "not JSON" in text and "1 images but 0 image parts" in text
    assert "record 7 has no answer to learn from" in text
    assert "record 8: 0 pictures x" in text and "of 200 at most" in text
    assert "over_long=drop or split" in text
    many = records(*["broken"] * 9)
    with pytest.raises(RecordError, match=r"and 4 more$"):
        survey(many, processor, Limits(200, "error"))


def test_long_records_are_dropped_and_listed(
    records: Callable[..., RecordDataset], processor: Processor
) -> None:
    data = records(line(0, ("what?", "a dog")), line(1, ("what?", "x" * 300)))
    found = survey(data, processor, Limits(200, "drop"))
    assert found.record.tolist() == [0]
    told = json.loads(found.too_long[0])
    assert told["id"] == "1" and told["tokens"] > 300 and told["most"] == 200
    with pytest.raises(RecordError, match=r"raise batches\.max_length"):
        survey(data, processor, Limits(10, "drop"))


def test_long_records_are_split_between_turns(
    records: Callable[..., RecordDataset], processor: Processor
) -> None:
    turns = [(f"question {i}?", f"answer {i} " + "y" * 20 * i) for i in range(4)]
    data = records(line(0, *turns, ("the long one", "z" * 900), ("last?", "yes"), pictures=1))
    most = 250
    found = survey(data, processor, Limits(most, "split"))
    samples = Samples(data, found)
    told = json.loads(found.too_long[0])
    assert told["turns_dropped"] == 1
    parts = [samples[i] for i in range(len(samples))]
    assert all(len(processor.encode_ids(part.messages)[0]) <= most for part in parts)
    assert found.length.tolist() == [len(processor.encode_ids(p.messages)[0]) for p in parts]
    answers = [m.text for part in parts for m in part.messages if m.role == "assistant"]
    assert answers == [answer for _, answer in turns] + ["yes"]
    assert all(part.images == data[0].images for part in parts)  # each is about the picture
    assert len(parts) == len({part.id for part in parts}) > 1


def test_a_part_keeps_the_system_text_and_all_pictures_so_far() -> None:
    from vlm.messages import Message, TextPart

    system = Message("system", (TextPart("be brief"),))
    messages = (
        *(system, user("one?", "a.png"), assistant("1")),
        *(user("two?", "b.png"), assistant("2"), user("three?"), assistant("3")),
    )
    record = Record("r", ("a.png", "b.png"), messages)
    part = part_of(record, 2, 3)
    assert part.messages == (system, user("three?", "a.png", "b.png"), assistant("3"))
    assert part_of(record, 0, 3) is record
    assert part_of(record, 1, 2).images == ("a.png", "b.png")


def test_the_result_is_kept_for_the_same_records(
    records: Callable[..., RecordDataset], processor: Processor, tmp_path: Path
) -> None:
    data = records(line(0, ("what?", "a dog")), line(1, ("what?", "x" * 300)))
    cache = tmp_path / "survey.npz"
    first = survey(data, processor, Limits(200, "drop"), cache=cache)
    kept = cache.read_bytes()
    again = survey(data, processor, Limits(200, "drop"), cache=cache)
    assert cache.read_bytes() == kept
    assert again.length.tolist() == first.length.tolist() and again.too_long == first.too_long
    other = survey(data, processor, Limits(1000, "drop"), cache=cache)
    assert len(other.length) == 2
    cache.write_bytes(cache.read_bytes()[:40])
    assert len(survey(data, processor, Limits(1000, "drop"), cache=cache).length) == 2


def survey_of(lengths: list[int], pictures: list[int]) -> Survey:
    number = np.arange(len(lengths))
    zeros = np.zeros_like(number)
    return Survey(number, zeros, zeros + 1, np.array(lengths), np.array(pictures))


@pytest.mark.parametrize("how", ["length", "modality_length", "picture"])
def test_each_sample_comes_once_in_another_order_each_epoch(how: str) -> None:
    draw = np.random.default_rng(0)
    found = survey_of(draw.integers(1, 99, 203).tolist(), draw.integers(0, 40, 203).tolist())
    sampler = GroupedSampler(found, how, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(203)) and first != sorted(first)
    assert first == list(GroupedSampler(found, how, 8, seed=3))
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(203)) and list(sampler) != first
    assert first != list(GroupedSampler(found, how, 8, seed=4))


def test_batches_have_like_lengths() -> None:
    draw = np.random.default_rng(1)
    lengths = draw.integers(1, 1000, 1600)
    found = survey_of(lengths.tolist(), [1] * 1600)
    batches = lengths[list(GroupedSampler(found, "length", 8, seed=0))].reshape(-1, 8)
    spread = np.ptp(batches, axis=1).mean()
    assert spread < 0.05 * np.ptp(lengths)
    assert abs(np.corrcoef(np.arange(200), batches.mean(axis=1))[0, 1]) < 0.3  # in no order


def test_batches_have_one_modality_but_for_the_rest() -> None:
    pictures = [5] * 83 + [0] * 45
    order = list(GroupedSampler(survey_of([1] * 128, pictures), "modality_length", 8, seed=0))
    shown = np.array(pictures)[order].reshape(-1, 8) != 0
    assert (shown.all(1) | ~shown.any(1)).sum() == 83 // 8 + 45 // 8


def test_samples_of_one_picture_share_a_batch() -> None:
    pictures = [1 + i % 50 for i in range(200)] + [0] * 24  # four of each picture, and texts
    order = list(GroupedSampler(survey_of([1] * 224, pictures), "picture", 8, seed=0))
    batches = np.array(pictures)[order].reshape(-1, 8)
    for number in range(1, 51):
        assert len({int(b) for b in np.nonzero(batches == number)[0]}) == 1
