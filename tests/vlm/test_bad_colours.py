"""Colour, orientation, frames and formats at their odd ends: the right pixels, or a typed error."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from vlm.errors import ImageError
from vlm.images import load_image


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    samples = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(samples).convert(mode)


def code_of(source: object, **options: object) -> str:
    try:
        load_image(source, **options)
    except ImageError as error:
        return error.code
    return "fine"


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(depth: int, kind: int, row: bytes, extra: bytes = b"") -> bytes:
    """One pixel, by hand from the specification."""
    header = struct.pack(">IIBBBBB", 1, 1, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


# Colour


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key"),
    [
        (1, 0, b"\x80", struct.pack(">H", 1)),
        (2, 0, b"\x40", struct.pack(">H", 1)),
        (4, 0, b"\x50", struct.pack(">H", 5)),
        (8, 0, b"\x50", struct.pack(">H", 0x50)),
        (16, 0, b"\x75\x30", struct.pack(">H", 0x7530)),
        (16, 2, b"\xff\xff\0\0\0\0", struct.pack(">HHH", 0xFFFF, 0, 0)),
    ],
)
def test_a_key_colour_of_any_depth_is_white(depth: int, kind: int, row: bytes, key: bytes) -> None:
    """The key is in the file's own depth (PNG, section 11.3.1.1), one step away is another."""
    data = png(depth, kind, row, chunk(b"tRNS", key))
    for source in (data, Image.open(io.BytesIO(data))):
        assert load_image(source).pixels.getpixel((0, 0)) == (255, 255, 255)
    other = bytes((0, 0)) * (len(key) // 2)
    seen = load_image(png(depth, kind, row, chunk(b"tRNS", other))).pixels
    assert seen.tobytes() == load_image(png(depth, kind, row)).pixels.tobytes()


def profile(colorants: tuple[tuple[float, float, float], ...], gamma: float) -> bytes:
    """A matrix profile with a pure power curve, by hand from ICC.1:2001-04 (version 2.4)."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    white = fixed(0.9642, 1.0, 0.8249)
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + bytes(79)
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": b"XYZ \0\0\0\0" + white}
    for letter, column in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*column)
        tags[letter + b"TRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        table += key + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table + body), b"", 0x02400000, b"mntr", b"RGB ", b"XYZ "
    )
    head += struct.pack(">6H4s28x", 2024, 1, 1, 0, 0, 0, b"acsp") + white
    return head + bytes(128 - len(head)) + table + body


# Colorants adapted to D50, as the profiles of that name have them.
DISPLAY_P3 = profile(
    ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), 2.2
)
ADOBE_RGB = profile(
    ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.2
)


@pytest.mark.parametrize("wide", [DISPLAY_P3, ADOBE_RGB], ids=["Display P3", "Adobe RGB"])
def test_wide_gamuts_become_srgb(wide: bytes) -> None:
    picture = noise()
    picture.paste((200, 100, 50), (0, 0, 8, 8))
    expected = ImageCms.profileToProfile(
        picture, io.BytesIO(wide), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert expected is not None
    assert expected.getpixel((0, 0)) != picture.getpixel((0, 0))
    for format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encode(picture, format, icc_profile=wide, **options)
        for source in (data, Image.open(io.BytesIO(data))):
            assert load_image(source).pixels.tobytes() == expected.tobytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_in_turns_a_picture_alike(tmp_path: Path, format: str, orientation: int) -> None:
    """Pillow's own `exif_transpose` is the oracle."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encode(noise(), format, exif=exif))
    expected = load_image(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert expected.pixels.size == ((40, 30) if orientation < 5 else (30, 40))
    loaded = Image.open(path)
    loaded.load()
    sources = [path, str(path), path.read_bytes(), Image.open(path), loaded]
    assert {load_image(source).sha256 for source in sources} == {expected.sha256}


# What it is, and which of its frames


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf<!-- made by hand -->\n<svg/>",
        b"<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1//EN'><svg/>",
        b"<?xml version='1.0'?>\n" + b"<!-- " + b"x" * 600 + b" --><svg/>",
    ],
)
def test_svg_is_told_whatever_comes_before_it(text: bytes) -> None:
    assert code_of(text) == "unsupported_format"
    assert code_of(b"<!-- page --><html></html>") == "undecodable"


def test_of_ten_thousand_frames_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = encode(noise("P"), "GIF")
    body = one[13 + 3 * 2 ** ((one[10] & 7) + 1) : -1]  # what follows header and palette
    decoded = []
    decoder = Image._getdecoder

    def counted(*given: object) -> object:
        decoded.append(given)
        return decoder(*given)

    monkeypatch.setattr("PIL.Image._getdecoder", counted)
    clean = load_image(one[:-1] + body * 9_999 + b";")
    assert len(decoded) == 1
    assert clean.animated and clean.size == (40, 30)
    assert clean.sha256 == load_image(one).sha256


def test_the_same_samples_in_another_mode_or_palette_are_another_picture() -> None:
    """One cache key would give one of them the other's answer."""
    samples = bytes(range(144))
    grey = Image.frombytes("L", (12, 12), samples)
    pictures = [grey, Image.frombytes("L", (16, 9), samples)]
    for first in (0, 100):
        palette = Image.frombytes("P", (12, 12), samples)
        palette.putpalette([(first + 7 * i) % 256 for i in range(768)])
        pictures.append(palette)
    pictures += [Image.frombytes(m, s, samples) for m, s in (("RGB", (8, 6)), ("RGBA", (6, 6)))]
    pictures += [Image.frombytes("CMYK", (6, 6), samples), Image.frombytes("LA", (9, 8), samples)]
    assert len({load_image(each).sha256 for each in pictures}) == len(pictures)
