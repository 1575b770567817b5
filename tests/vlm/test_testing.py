"""The fakes that everybody's tests stand on."""

import time
from pathlib import Path

import torch

from vlm import testing
from vlm.checkpoint import load_checkpoint


def test_folders_are_quick_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    testing.tiny_llava_folder(tmp_path / "warm")
    start = time.perf_counter()
    testing.tiny_llava_folder(tmp_path / "a", seed=3)
    assert time.perf_counter() - start < 1
    torch.rand(5)
    testing.tiny_llava_folder(tmp_path / "b", seed=3)
    testing.tiny_llava_folder(tmp_path / "c", seed=4)
    first, second, third = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert first == second != third


def test_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    testing.tiny_llava_folder(tmp_path)
    testing.draw_image()
    assert torch.equal(torch.rand(3), expected)


def test_tokenizer_writes_any_text() -> None:
    tokenizer = testing.byte_tokenizer()
    text = "the thing — 🐶\n\t in a</s"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pictures_differ_by_seed() -> None:
    assert testing.draw_image(seed=1).tobytes() == testing.draw_image(seed=1).tobytes()
    assert testing.draw_image(seed=1).tobytes() != testing.draw_image(seed=2).tobytes()
    assert testing.draw_image((5, 9)).size == (5, 9)


def test_the_tiny_model_is_tiny(tmp_path: Path) -> None:
    model, processor = load_checkpoint(testing.tiny_llava_folder(tmp_path))
    assert sum(p.numel() for p in model.parameters()) < 120_000
    assert processor.num_visual_tokens == testing.NUM_VISUAL_TOKENS
