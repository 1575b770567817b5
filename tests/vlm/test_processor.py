"""The processor: lengths, batches, pixels, and what it refuses."""

import io
import json
import pickle
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil

from vlm import testing
from vlm.errors import CheckpointError, ConfigError, ContextLengthError, ImageError
from vlm.images import load_image
from vlm.messages import assistant, user
from vlm.pixels import Preprocessing
from vlm.processor import Processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor.from_folder(folder)


@pytest.mark.parametrize("size", [(28, 28), (60, 40), (17, 90), (1, 1), (200, 3)])
def test_pixels_are_those_of_the_pil_backend(processor: Processor, size: tuple[int, int]) -> None:
    image = testing.draw_image(size, seed=size[0])
    expected = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixel_values([load_image(image)]), expected)


def test_every_level_has_the_exact_value(processor: Processor) -> None:
    """The table for pictures of the model's size, over all 256 levels."""
    image = Image.frombytes("RGB", (28, 28), bytes(i % 256 for i in range(28 * 28 * 3)))
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixel_values([load_image(image)]), expected)


def test_no_pictures_give_an_empty_tensor(processor: Processor) -> None:
    assert processor.pixel_values([]).shape == (0, 3, 28, 28)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_labels(processor: Processor, side: str) -> None:
    short = processor.encode([user("q"), assistant("a")])
    long = processor.encode([user("which colour?", testing.draw_image()), assistant("red")])
    batch = processor.collate([short, long], padding_side=side, labels=True)
    gap = len(long.input_ids) - len(short.input_ids)
    real = slice(gap, None) if side == "left" else slice(None, -gap)
    assert batch["input_ids"][0, real].tolist() == short.input_ids
    assert batch["input_ids"][1].tolist() == long.input_ids
    assert batch["attention_mask"].sum(-1).tolist() == [len(short.input_ids), len(long.input_ids)]
    assert batch["attention_mask"][0, real].all()
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    for row, labels in zip(
        (short, long), (batch["labels"][0, real], batch["labels"][1]), strict=True
    ):
        pairs = zip(row.input_ids, row.loss_mask, strict=True)
        assert labels.tolist() == [number if flag else -100 for number, flag in pairs]
    assert (batch["labels"] != -100).sum() == sum(short.loss_mask) + sum(long.loss_mask)


def test_collate_without_pictures_has_no_pixels(processor: Processor) -> None:
    batch = processor.collate([processor.encode([user("q")])])
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_full_context_fits_and_one_more_does_not(processor: Processor) -> None:
    base = len(processor.encode([user("x", testing.draw_image())]).input_ids)
    room = processor.context_length - base + 1
    fitting = processor.encode([user("x" * room, testing.draw_image())])
    assert len(fitting.input_ids) == processor.context_length == 512
    with pytest.raises(ContextLengthError) as caught:
        processor.encode([user("x" * (room + 1), testing.draw_image())])
    text = 513 - 4
    assert f"1 pictures x 4 visual tokens + {text} text tokens = 513" in str(caught.value)


def test_pictures_that_do_not_fit_are_never_cut(processor: Processor) -> None:
    pictures = [testing.draw_image()] * 200
    with pytest.raises(ContextLengthError, match="200 pictures x 4"):
        processor.encode([user("x", *pictures)])


def test_a_broken_picture_is_an_image_error(processor: Processor) -> None:
    with pytest.raises(ImageError):
        processor.encode([user("x", b"no picture")])


def test_big_jpegs_may_be_decoded_smaller_but_small_ones_are_exact(processor: Processor) -> None:
    for size, is_drafted in (((100, 100), False), ((900, 900), True)):
        stream = io.BytesIO()
        testing.draw_image(size).save(stream, "JPEG")
        [clean] = processor.encode([user("x", stream.getvalue())]).images
        assert (clean.pixels.size != size) == is_drafted
        assert min(clean.pixels.size) >= 2 * processor.image_size


def noisy_jpeg(size: tuple[int, int]) -> bytes:
    width, height = size
    samples = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(samples).save(stream, "JPEG")
    return stream.getvalue()


def levels(processor: Processor, data: bytes, way: Preprocessing) -> np.ndarray:
    """Pixels (3, H, W) in levels of 8 bits."""
    processor.preprocessing = way
    values = processor.pixel_values(processor.encode([user("x", data)]).images)[0].numpy()
    made = processor.image_processor
    mean, std = (np.array(each)[:, None, None] for each in (made.image_mean, made.image_std))
    return np.asarray(255 * (values * std + mean))


def test_each_way_of_preprocessing_keeps_its_promise(folder: Path) -> None:
    """Exact; at times a level off; decoded smaller if it is big, and exact otherwise."""
    processor = Processor.from_folder(folder)
    assert processor.preprocessing == "draft" and processor.draft_to == 56
    boxed = []
    for size in ((900, 701), *((width, 55) for width in range(60, 110))):
        data = noisy_jpeg(size)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        steps: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        theirs = processor.image_processor(picture, **steps)["pixel_values"][0].astype(float)
        found = {way: levels(processor, data, way) for way in get_args(Preprocessing)}
        error = {way: np.abs(each - theirs) for way, each in found.items()}
        assert error["exact"].max() < 1e-3
        assert error["box"].max() < 1.01
        boxed.append(error["box"].max() > 0.99)
        if size[0] == 900:
            assert 1.01 < error["draft"].max() < 40
        else:
            assert np.array_equal(found["draft"], found["exact"])
    assert any(boxed) and not all(boxed)
    processor.preprocessing = "exact"
    assert processor.draft_to is None
    with pytest.raises(ConfigError, match="'fast'; known: exact, box, draft"):
        processor.preprocessing = "fast"  # type: ignore[assignment]


def test_decode_leaves_special_tokens_out(processor: Processor) -> None:
    row = processor.encode([user("é 🐶?", testing.draw_image()), assistant(" two  spaces , ok")])
    text = processor.decode(row.input_ids)
    assert "USER: \né 🐶? ASSISTANT:  two  spaces , ok" in text


def test_it_travels_to_data_loader_workers(processor: Processor) -> None:
    copy = pickle.loads(pickle.dumps(processor))
    messages = [user("<image>?", testing.draw_image()), assistant("red")]
    for _ in range(2):
        assert copy.encode(messages).input_ids == processor.encode(messages).input_ids


def test_saved_processor_equals_the_original(processor: Processor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["patch_size"] == 14
    assert saved["num_additional_image_tokens"] == 1
    assert saved["vision_feature_select_strategy"] == "default"
    theirs = AutoProcessor.from_pretrained(tmp_path)
    image = testing.draw_image((50, 40))
    text = {"type": "text", "text": "what?"}
    chat = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)
    expected = theirs(text=prompt, images=image, return_tensors="pt")
    ours = processor.collate([processor.encode([user("what?", image)], add_generation_prompt=True)])
    assert torch.equal(ours["input_ids"], expected["input_ids"])
    assert torch.equal(ours["pixel_values"], expected["pixel_values"])


def _edit(folder: Path, target: Path, name: str, **changes: object) -> Path:
    """A copy of `folder` with changed values in one JSON file; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    raw = json.loads((target / name).read_text())
    for key, value in changes.items():
        raw[key] = value
    (target / name).write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return target


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_size": 7}, "patch_size is 7 for the processor but 14"),
        ({"vision_feature_select_strategy": "full"}, "make them equal"),
        ({"image_processor": {"image_processor_type": "ViTImageProcessor"}}, "ViTImageProcessor"),
        ({"image_processor": {"image_processor_type": "CLIPImageProcessor"}}, "224x224"),
    ],
)
def test_contradictions_with_the_config_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    broken = _edit(folder, tmp_path / "x", "processor_config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        Processor.from_folder(broken)


def test_older_folders_keep_pixels_and_template_in_other_files(
    folder: Path, processor: Processor, tmp_path: Path
) -> None:
    old = _edit(folder, tmp_path / "x", "processor_config.json")
    raw = json.loads((old / "processor_config.json").read_text())
    (old / "processor_config.json").unlink()
    (old / "preprocessor_config.json").write_text(json.dumps(raw["image_processor"]))
    template = (old / "chat_template.jinja").read_text()
    (old / "chat_template.jinja").unlink()
    (old / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    messages = [user("q", testing.draw_image())]
    opened = Processor.from_folder(old)
    assert opened.chat_template == processor.chat_template
    assert opened.encode(messages).input_ids == processor.encode(messages).input_ids


def test_a_tokenizer_without_the_image_token_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = _edit(folder, tmp_path / "x", "config.json", image_token_index=200)
    with pytest.raises(CheckpointError, match="image_token_index 200"):
        Processor.from_folder(broken)


def test_encoding_a_dialogue_is_fast(processor: Processor) -> None:
    image = load_image(testing.draw_image())
    turns = [user("what is top left?", image), assistant("a dog")]
    turns += [user("and how many are there?"), assistant("three")] * 3
    processor.encode(turns)
    best = min(_seconds(processor, turns) for _ in range(30))
    assert best < 0.005  # about 0.5 ms on one ordinary core


def _seconds(processor: Processor, turns: list[object]) -> float:
    start = time.perf_counter()
    processor.encode(turns)  # type: ignore[arg-type]
    return time.perf_counter() - start
