"""Sight probes: losses against transformers' own model, and when a model is said to look."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from train.config import RunConfig
from train.dataset import RecordDataset
from train.jobs import Job, instruct_job
from train.probes import Probes, Sight, interval, spread, verdict
from train.survey import Samples
from vlm.messages import Record, read_records
from vlm.processor import Processor
from vlm.testing import draw_image


def line(number: int, picture: int | None, answer: str) -> str:
    shown = [] if picture is None else [{"type": "image"}]
    asked = [*shown, {"type": "text", "text": f"what is {number}?"}]
    said = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    images = [] if picture is None else [f"{picture}.png"]
    return json.dumps({"id": str(number), "images": images, "messages": messages})


def opened(folder: Path, llava: str, lines: list[str]) -> tuple[Job, Samples]:
    for picture in range(3):
        draw_image(seed=picture).save(folder / f"{picture}.png")
    (folder / "held.jsonl").write_text("\n".join(lines))
    values = {"stage": "instruct", "output": str(folder / "out"), "data": ["x"]}
    more = {"model": {"start": llava}, "learning_rate": 0.1, "batch_size": 1}
    data = RecordDataset([folder / "held.jsonl"])
    job = instruct_job(RunConfig.model_validate(values | more), data)
    assert job.dialogues is not None
    return job, Samples(data, job.dialogues.survey(data, None))


def cost(llava: str, record: Record, picture: Image.Image) -> tuple[float, int]:
    """Surprise at the answer's tokens by transformers' own class, and how many there are."""
    processor = Processor.from_folder(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    ids, mask = processor.encode_ids(record.messages)
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    places = [place for place, learnt in enumerate(mask) if learnt]
    chances = F.log_softmax(logits[[place - 1 for place in places]], -1)
    wanted = torch.tensor([ids[place] for place in places])
    return -float(chances[range(len(places)), wanted].sum()), len(places)


def test_probes_are_the_losses_of_the_same_answers(tmp_path: Path, llava: str) -> None:
    answers = ("a cat", "red and blue " * 4, "nothing", "two")
    lines = [line(n, p, answers[n]) for n, p in enumerate((0, 0, None, 1))]
    job, held_out = opened(tmp_path, llava, lines)
    probes = Probes(job, held_out, 64)
    assert len(probes) == 2  # one record of each picture
    job.model.train()
    found = probes.measure()
    assert job.model.training

    first, _, _, second = read_records(tmp_path / "held.jsonl")
    own = [Image.open(tmp_path / f"{picture}.png") for picture in (0, 1)]
    grey = Image.new("RGB", (28, 28), (128, 128, 128))
    shown = {"right": own, "blank": [grey, grey], "other": own[::-1]}
    for name, pictures in shown.items():
        costs = [cost(llava, r, p) for r, p in zip((first, second), pictures, strict=True)]
        expected = sum(c for c, _ in costs) / sum(n for _, n in costs)
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4), name
    assert found.right != found.other != found.blank
    assert found.low < found.other - found.right < found.high


def test_without_two_pictures_there_is_nothing_to_compare(tmp_path: Path, llava: str) -> None:
    lines = [line(0, 0, "a"), line(1, 0, "b"), line(2, None, "c")]
    assert len(Probes(*opened(tmp_path, llava, lines), 64)) == 0


def test_a_bad_picture_is_no_probe(tmp_path: Path, llava: str) -> None:
    job, held_out = opened(tmp_path, llava, [line(n, n, "a") for n in range(3)])
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert len(Probes(job, held_out, 64)) == 2
    assert len(Probes(job, held_out, 0)) == 0


def test_the_interval_pairs_records() -> None:
    counts = [1, 5, 2, 8]
    assert interval([0.5 * n for n in counts], counts) == pytest.approx((0.5, 0.5))
    lots = np.random.default_rng(1)
    gains = lots.normal(1.0, 2.0, 400)
    low, high = interval(gains.tolist(), [1] * 400)
    error = gains.std(ddof=1) / 20
    assert low == pytest.approx(gains.mean() - 1.96 * error, abs=0.03)
    assert high == pytest.approx(gains.mean() + 1.96 * error, abs=0.03)


def test_the_verdict_is_certain_or_not_given() -> None:
    sure, unsure = Sight(1.0, 1.6, 1.5, 0.1, 0.9), Sight(1.0, 1.6, 1.5, -0.1, 1.1)
    assert verdict(sure.numbers()).startswith("it looks: ") and "+0.500" in verdict(sure.numbers())
    assert verdict(unsure.numbers()).startswith("it does not look yet: ")


def test_records_are_taken_from_all_over_the_file() -> None:
    assert spread(np.arange(100), 3) == [0, 50, 99]
    assert spread(np.array([4, 7]), 5) == [4, 7]
    assert spread(np.arange(5), 0) == [] == spread(np.arange(0), 5)
