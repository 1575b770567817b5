"""Many pictures: the captions of `Assistant.caption`, in order, whatever lies among them."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm import testing
from vlm.assistant import Assistant
from vlm.captioning import CaptionResult, caption_many
from vlm.errors import ConfigError, ContextLengthError, MessageError

TOKENS = 24  # from here on each picture has a caption of its own


def captions(model: Assistant, *paths: Path, **options: Any) -> list[CaptionResult]:
    return list(model.caption_many(paths, max_new_tokens=TOKENS, **options))


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 69 bytes that declares 20000 x 20000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(4)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_batch_gives_what_one_by_one_gives(
    model: Assistant, pictures: Path, batch_size: int
) -> None:
    expected = [
        model.caption(testing.draw_image(seed=seed), max_new_tokens=TOKENS) for seed in range(7)
    ]
    assert len(set(expected)) == 7  # the model looks at the picture
    found = captions(model, pictures, batch_size=batch_size)
    assert [result.caption for result in found] == expected
    assert [result.path for result in found] == [str(pictures / f"{seed}.png") for seed in range(7)]
    assert {result.finish_reason for result in found} <= {"stop", "length"}
    assert not any(result.error or result.code for result in found)


def test_the_prompt_replaces_the_models_own(model: Assistant, pictures: Path) -> None:
    first = pictures / "0.png"
    [found] = captions(model, first, prompt="what is it?")
    assert found.caption == model.ask(first, "what is it?", max_new_tokens=TOKENS)
    assert found.caption != captions(model, first)[0].caption


BAD_FILES = {
    "bomb.png": (bomb(), "too_many_pixels"),
    "cut.jpg": (encode(testing.draw_image((90, 90)), "JPEG")[:-300], "truncated"),
    "empty.png": (b"", "empty_image"),
    "page.jpg": (b"%PDF-1.7\n", "unsupported_format"),
    "text.png": (b"no picture\n", "undecodable"),
}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_files_become_results_and_never_stop_the_rest(
    model: Assistant, pictures: Path, batch_size: int
) -> None:
    good = {result.path: result for result in captions(model, pictures)}
    for name, (data, _) in BAD_FILES.items():
        (pictures / name).write_bytes(data)
    absent = pictures / "absent.png"
    found = {r.path: r for r in captions(model, absent, pictures, batch_size=batch_size)}
    expected = {str(pictures / name): code for name, (_, code) in BAD_FILES.items()}
    expected[str(absent)] = "missing"
    assert {path: r.code for path, r in found.items() if r.code} == expected
    assert {path: r for path, r in found.items() if not r.code} == good
    for path in expected:
        assert found[path].caption is None and found[path].finish_reason is None
        assert "\n" not in str(found[path].error)
    assert found[str(pictures / "bomb.png")].size == len(bomb()) == 69


def test_no_file_at_all_gives_nothing(model: Assistant, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert captions(model, tmp_path) == captions(model) == []
    [named] = captions(model, tmp_path / "notes.txt")
    assert named.code == "undecodable"


def test_a_folder_that_may_not_be_listed_is_told(
    model: Assistant, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answer is simulated: to root, every folder is readable."""
    closed = pictures / "closed"
    closed.mkdir()
    listing = os.scandir

    def scandir(path: str) -> Any:
        if path == str(closed):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = captions(model, pictures)
    assert len(found) == 8
    assert [(r.path, r.code) for r in found if r.error] == [(str(closed), "unreadable")]


# Colours


def test_every_kind_of_picture_is_captioned_as_its_clean_twin(
    model: Assistant, tmp_path: Path
) -> None:
    clean = testing.draw_image((40, 30), seed=3)
    grey = clean.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored rows are the visible columns
    turned = clean.transpose(Image.Transpose.ROTATE_90)
    wide = Image.new("I;16", grey.size)
    wide.putdata([257 * level for level in grey.get_flattened_data()])
    twins = [
        ("rgba.png", encode(clean.convert("RGBA"), "PNG"), clean),
        ("cmyk.tif", encode(clean.convert("CMYK"), "TIFF"), clean),
        ("turned.png", encode(turned, "PNG", exif=exif), clean),
        ("turned.webp", encode(turned, "WEBP", exif=exif, lossless=True), clean),
        ("wide.png", encode(wide, "PNG"), grey),
    ]
    for name, data, _ in twins:
        (tmp_path / name).write_bytes(data)
    found = captions(model, *(tmp_path / name for name, _, _ in twins))
    expected = [model.caption(twin, max_new_tokens=TOKENS) for _, _, twin in twins]
    assert [result.caption for result in found] == expected
    assert model.caption(turned, max_new_tokens=TOKENS) != expected[0] != expected[-1]


# Wrong options


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", True, None])
def test_a_bad_batch_size_is_told_at_once(model: Assistant, batch_size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        caption_many(model, [], batch_size=batch_size)


def test_prompts_that_cannot_be_asked_are_told(model: Assistant, pictures: Path) -> None:
    with pytest.raises(MessageError, match="empty"):
        caption_many(model, [pictures], prompt="  ")
    with pytest.raises(ContextLengthError, match="positions"):
        list(caption_many(model, [pictures], prompt="a" * 600))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        list(caption_many(model, [pictures], max_new_tokens=0))
