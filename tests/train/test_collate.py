"""Records to batches: what is learnt, what stays small, and what is refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from train.collate import DialogueCollator, PairCollator, TextCollator
from train.contrastive import MAX_TEXT_TOKENS
from train.tokenizer import train_tokenizer
from vlm.checkpoint import load_checkpoint
from vlm.errors import RecordError
from vlm.messages import Message, Record, TextPart, assistant, user
from vlm.processor import Processor
from vlm.testing import IMAGE_SIZE, byte_tokenizer, draw_image, image_processor

SYSTEM = Message("system", (TextPart("Be brief."),))


def record(name: str, *messages: Message) -> Record:
    images = tuple(str(image) for message in messages for image in message.images)
    return Record(name, images, messages)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    draw_image(seed=1).save(path)
    return str(path)


@pytest.fixture(scope="module")
def processor(llava: str) -> Processor:
    return load_checkpoint(llava)[1]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a red guitar", "two fish"] * 3, 300)


@pytest.fixture(scope="module")
def pairs(words: PreTrainedTokenizerFast) -> PairCollator:
    return PairCollator(words, image_processor(), IMAGE_SIZE)


def learnt(tokenizer: PreTrainedTokenizerFast, batch: dict[str, torch.Tensor]) -> list[str]:
    """The supervised text of each row; labels stand where their tokens stand."""
    ids, labels = batch["input_ids"], batch["labels"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    return [tokenizer.decode(row[row != -100]) for row in labels]


def test_only_answers_are_learnt_beside_a_picture(processor: Processor, picture: str) -> None:
    asked = (user("what?", picture), assistant("red"), user("sure?"), assistant("a bit"))
    rows = [record("long", SYSTEM, *asked), record("short", SYSTEM, user("hi"), assistant("ho"))]
    batch = DialogueCollator(processor)(rows)
    tokenizer = processor.tokenizer
    assert learnt(tokenizer, batch) == ["red</s> a bit</s>", "ho</s>"]
    assert batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    lengths = batch["attention_mask"].sum(1)
    assert batch["attention_mask"][1, : lengths[1]].all() and lengths[1] < lengths[0]
    assert (batch["input_ids"][1, lengths[1] :] == tokenizer.pad_token_id).all()


def test_only_answers_are_learnt_in_texts_alone(words: PreTrainedTokenizerFast) -> None:
    rows = [
        record("long", SYSTEM, user("what?"), assistant("red"), user("sure?"), assistant("a bit")),
        record("short", user("hi"), assistant("ho")),
    ]
    batch = TextCollator(words, 64)(rows)
    assert learnt(words, batch) == ["red<|end|> a bit<|end|>", "ho<|end|>"]
    kept = batch["attention_mask"].bool()
    short = batch["input_ids"][1][kept[1]]
    assert words.decode(short) == "<|user|> hi<|end|><|assistant|> ho<|end|>"
    assert (batch["input_ids"][~kept] == words.pad_token_id).all()
    assert kept[1, 0] and not kept[1, -1]


def test_a_typed_marker_is_no_turn(words: PreTrainedTokenizerFast) -> None:
    row = record("a", user("<|assistant|>ha<|end|>"), assistant("ho<image>"))
    batch = TextCollator(words, 64)([row])
    end, image = words.convert_tokens_to_ids(["<|end|>", "<image>"])
    assert (batch["input_ids"] == end).sum() == 2 and not (batch["input_ids"] == image).any()
    assert learnt(words, batch) == ["ho<image><|end|>"]


def test_errors_name_the_record(
    processor: Processor, pairs: PairCollator, picture: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    fine = record("fine", user("what?", picture), assistant("red"))
    for collate in (DialogueCollator(processor), pairs):
        for path in (broken, tmp_path / "absent.png"):
            with pytest.raises(RecordError, match=rf"record bad: .*{path.name}"):
                collate([fine, record("bad", user("what?", str(path)), assistant("red"))])


def test_a_record_with_nothing_to_learn_is_refused(
    processor: Processor, words: PreTrainedTokenizerFast, pairs: PairCollator, picture: str
) -> None:
    dialogue, text = DialogueCollator(processor), TextCollator(words, 64)
    fine = record("fine", user("hi"), assistant("ho"))
    for collate in (dialogue, text):
        with pytest.raises(RecordError, match=r"record bad has no answer"):
            collate([fine, record("bad", user("hi"))])
    for collate in (dialogue, text, pairs):
        with pytest.raises(RecordError, match=r"record bad"):
            collate([record("bad")])
    with pytest.raises(RecordError, match=r"record bad has 1 pictures and 0 answers"):
        pairs([record("bad", user("hi", picture))])


def test_over_long_texts_are_refused(
    processor: Processor, words: PreTrainedTokenizerFast, pairs: PairCollator, picture: str
) -> None:
    fits = record("fits", user("a"), assistant("b"))
    length = TextCollator(words, 64)([fits])["input_ids"].shape[1]
    assert TextCollator(words, length)([fits])["input_ids"].shape == (1, length)
    with pytest.raises(RecordError, match=rf"record fits has {length} tokens.* {length - 1};"):
        TextCollator(words, length - 1)([fits])
    long = record("long", user("what?", picture), assistant("x" * processor.context_length))
    with pytest.raises(RecordError, match=r"record long: 1 pictures x 4 visual .* 512;"):
        DialogueCollator(processor)([fits, long])
    short = record("short", user("what?", picture), assistant("b"))
    with pytest.raises(RecordError, match=rf"record long has .* takes {MAX_TEXT_TOKENS}"):
        pairs([short, long])


def test_texts_take_no_pictures_and_pairs_take_one(
    words: PreTrainedTokenizerFast, pairs: PairCollator, picture: str
) -> None:
    with pytest.raises(RecordError, match=r"record bad has pictures"):
        TextCollator(words, 64)([record("bad", user("what?", picture), assistant("red"))])
    for images in ((), (picture, picture)):
        with pytest.raises(RecordError, match=rf"record bad has {len(images)} pictures"):
            pairs([record("bad", user("what?", *images), assistant("red"))])


def test_targets_say_which_texts_belong_to_which_picture(
    words: PreTrainedTokenizerFast, pairs: PairCollator, picture: str
) -> None:
    names = [("red fish", "two"), ("a guitar",), ("two", "a guitar", "two")]
    rows = []
    for index, own in enumerate(names):
        first, *rest = (m for name in own for m in (user("name one"), assistant(name)))
        rows.append(record(str(index), user(first.text, picture), *rest))
    batch = pairs(rows)
    texts = [
        words.decode(ids[mask.bool()]).strip()
        for ids, mask in zip(batch["text_ids"], batch["text_mask"], strict=True)
    ]
    assert sorted(texts) == ["a guitar", "red fish", "two"]
    for row, own in zip(batch["targets"].tolist(), names, strict=True):
        assert row == [float(text in own) for text in texts]
    lengths = batch["text_mask"].sum(1).tolist()
    expected = [[1] * n + [0] * (max(lengths) - n) for n in lengths]
    assert batch["text_mask"].tolist() == expected  # padded on the right


@pytest.mark.parametrize(("side", "expected"), [(14, 14), (28, 28), (64, 28)])
def test_a_close_up_stays_small_and_a_picture_gets_the_size_of_the_tower(
    pairs: PairCollator, tmp_path: Path, side: int, expected: int
) -> None:
    image = draw_image((side, side))
    image.save(tmp_path / "a.png")
    row = record("a", user("what?", str(tmp_path / "a.png")), assistant("red"))
    pixels = pairs([row, row])["pixel_values"]
    assert pixels.shape == (2, 3, expected, expected) and pixels.dtype == torch.float32
    if side <= IMAGE_SIZE:
        processor = image_processor()
        scaled = np.asarray(image, dtype=np.float64) / 255
        normalised = (scaled - processor.image_mean) / processor.image_std
        assert np.abs(pixels[0].numpy().transpose(1, 2, 0) - normalised).max() < 1e-5


def test_the_tokenizer_of_another_project_serves_as_well() -> None:
    batch = TextCollator(byte_tokenizer(), 512)([record("a", user("hi"), assistant("red"))])
    assert learnt(byte_tokenizer(), batch) == ["red</s>"]
