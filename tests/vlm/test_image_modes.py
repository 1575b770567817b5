"""Colours and orientation: what the file means is what the model sees."""

import io
import itertools
import struct
import warnings
import zlib

import pytest
from PIL import Image, ImageCms

from vlm.errors import ImageError
from vlm.images import load_image


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG written by hand from the specification, so that no library is both sides."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def pixel(source: object, at: tuple[int, int] = (0, 0)) -> tuple[int, int, int]:
    clean = load_image(source)
    assert clean.pixels.mode == "RGB"
    return clean.pixels.getpixel(at)


def near(found: tuple[int, ...], expected: tuple[int, ...], tolerance: int) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= tolerance


def test_hidden_colour_under_transparency_is_white_everywhere() -> None:
    hidden_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    for source in (hidden_red, encode(hidden_red, "PNG"), encode(hidden_red, "TIFF")):
        assert pixel(source) == (255, 255, 255)
    grey = Image.new("LA", (2, 2), (0, 0))
    assert pixel(grey) == pixel(encode(grey, "PNG")) == (255, 255, 255)
    palette = png(1, 1, 8, 3, b"\0\0", chunk(b"PLTE", b"\xff\0\0") + chunk(b"tRNS", b"\0"))
    assert pixel(palette) == (255, 255, 255)
    key_colour = png(1, 1, 8, 2, b"\0\x0a\x14\x1e", chunk(b"tRNS", b"\0\x0a\0\x14\0\x1e"))
    assert pixel(key_colour) == (255, 255, 255)
    assert pixel(encode(Image.new("P", (2, 2)), "GIF", transparency=0)) == (255, 255, 255)


@pytest.mark.parametrize("alpha", [0, 1, 64, 128, 200, 255])
def test_half_transparency_mixes_with_white(alpha: int) -> None:
    colour = (10, 100, 250)
    expected = tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour)
    assert near(pixel(Image.new("RGBA", (2, 2), (*colour, alpha))), expected, 1)
    rows = b"\0" + bytes((*colour, alpha))
    assert near(pixel(png(1, 1, 8, 6, rows)), expected, 1)
    premultiplied = Image.new("RGBA", (2, 2), (*colour, alpha)).convert("RGBa")
    assert near(pixel(premultiplied), expected, 3)
    assert near(pixel(Image.new("La", (2, 2), (0, alpha))), (255 - alpha,) * 3, 1)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.61, 1.0])
def test_sixteen_bits_are_scaled_and_not_clipped(share: float) -> None:
    sample, expected = round(share * 65535), round(share * 255)
    by_hand = png(1, 1, 16, 0, b"\0" + struct.pack(">H", sample))
    assert pixel(by_hand) == (expected,) * 3
    for mode in ("I;16", "I;16B", "I;16L"):
        assert pixel(Image.new(mode, (2, 2), sample)) == (expected,) * 3
    assert pixel(encode(Image.new("I;16", (2, 2), sample), "TIFF")) == (expected,) * 3
    rgb = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", sample, 0, 65535))
    assert near(pixel(rgb), (expected, 0, 255), 1)


def test_wide_samples_without_a_declared_range() -> None:
    assert pixel(Image.new("F", (2, 2), 0.5)) == (128,) * 3
    assert pixel(Image.new("F", (2, 2), 127.0)) == (127,) * 3
    assert pixel(encode(Image.new("F", (2, 2), 0.25), "TIFF")) == (64,) * 3
    assert pixel(Image.new("I", (2, 2), 200)) == (200,) * 3
    assert pixel(Image.new("I", (2, 2), 40_000)) == (round(40_000 / 257),) * 3
    ramp = Image.new("F", (3, 1))
    for x, value in enumerate((-1e6, 0.0, 1e6)):
        ramp.putpixel((x, 0), value)
    assert [pixel(ramp, (x, 0))[0] for x in range(3)] == [0, 128, 255]
    with pytest.raises(ImageError, match="infinite"):
        load_image(Image.new("F", (2, 2), float("inf")))


def test_every_other_mode_is_converted_or_refused() -> None:
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(png(8, 1, 1, 0, b"\0\x80"), (0, 0)) == (255, 255, 255)
    assert pixel(png(8, 1, 1, 0, b"\0\x80"), (1, 0)) == (0, 0, 0)
    for mode in ("YCbCr", "HSV", "RGBX"):
        picture = Image.new("RGB", (2, 2), (200, 100, 50)).convert(mode)
        assert near(pixel(picture), (200, 100, 50), 3)
    with pytest.raises(ImageError) as caught:
        load_image(Image.new("I;16N", (2, 2)))
    assert caught.value.code == "unsupported_mode"


@pytest.mark.parametrize(
    ("ink", "expected"),
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_cmyk_also_as_adobe_stores_it(ink: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    picture = Image.new("CMYK", (16, 16), ink)
    jpeg = encode(picture, "JPEG", quality=95)
    assert b"Adobe" in jpeg  # the marker that says: samples are inverted
    for source in (picture, jpeg, encode(picture, "TIFF")):
        assert near(pixel(source), expected, 3)


def test_lab() -> None:
    """CIE Lab of a mid grey and of a red (D50), from the CIE formulas."""
    for lab, expected in (((137, 128, 128), (128, 128, 128)), ((139, 209, 198), (255, 0, 0))):
        picture = Image.new("LAB", (4, 4), lab)
        assert near(pixel(picture), expected, 9)
        assert near(pixel(encode(picture, "TIFF")), expected, 9)


def swapped_profile() -> bytes:
    """An RGB profile whose red and blue colorants are exchanged: easy to tell apart."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data = bytearray(bytes(data).replace(b"s\0R\0G\0B", b"X\0X\0X\0X"))
    red, blue = data.index(b"rXYZ", 128), data.index(b"bXYZ", 128)
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_colour_profiles_are_converted_or_ignored() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    profile = swapped_profile()
    converted = (0, 0, 255)
    assert near(pixel(encode(red, "PNG", icc_profile=profile)), converted, 2)
    assert near(pixel(encode(red, "JPEG", quality=95, icc_profile=profile)), converted, 4)
    palette = encode(red.quantize(2), "PNG", icc_profile=profile)
    assert near(pixel(palette), converted, 2)
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert near(pixel(encode(half, "PNG", icc_profile=profile)), (127, 127, 255), 2)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for ignored in (srgb, b"garbage", profile[:200], b"\0" * 500):
        assert pixel(encode(red, "PNG", icc_profile=ignored)) == (255, 0, 0)
    grey = Image.new("L", (8, 8), 77)  # an RGB profile does not fit a grey picture
    assert pixel(encode(grey, "PNG", icc_profile=profile)) == (77, 77, 77)


def exif(orientation: int, order: str) -> bytes:
    """One directory with one entry, from the TIFF 6.0 specification."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    directory = struct.pack(f"{order}IH", 8, 1) + entry + b"\0\0\0\0"
    return b"Exif\0\0" + mark + directory


def scramble(upright: Image.Image, orientation: int) -> Image.Image:
    """Store `upright` as a camera with this orientation would: by the EXIF table itself.

    The table says where the stored row 0 and column 0 lie on the visible picture.
    """
    row0, column0 = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    width, height = upright.size
    stored = Image.new("RGB", (width, height) if orientation < 5 else (height, width))
    for row, column in itertools.product(range(stored.height), range(stored.width)):
        place = {"top": ("y", row), "bottom": ("y", height - 1 - row)}
        place |= {"left": ("x", row), "right": ("x", width - 1 - row)}
        across = {"top": ("y", column), "bottom": ("y", height - 1 - column)}
        across |= {"left": ("x", column), "right": ("x", width - 1 - column)}
        at = dict([place[row0], across[column0]])
        stored.putpixel((column, row), upright.getpixel((at["x"], at["y"])))
    return stored


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_upright_and_identical(orientation: int, order: str) -> None:
    upright = Image.frombytes("RGB", (5, 3), bytes(range(45)))
    stored = scramble(upright, orientation)
    data = encode(stored, "PNG", exif=exif(orientation, order))
    expected = load_image(upright).sha256
    assert load_image(data).sha256 == expected
    assert load_image(Image.open(io.BytesIO(data))).sha256 == expected
    lossless = encode(stored, "WEBP", lossless=True, exif=exif(orientation, order))
    assert load_image(lossless).sha256 == expected
    tagged = Image.Exif()
    tagged[0x0112] = orientation
    assert load_image(encode(stored, "TIFF", exif=tagged)).sha256 == expected


def test_exif_of_a_photo() -> None:
    left_red = Image.new("RGB", (64, 32), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 32, 32))
    data = encode(scramble(left_red, 6), "JPEG", quality=95, exif=exif(6, ">"))
    clean = load_image(data)
    assert (clean.size, clean.pixels.size) == ((32, 64), (64, 32))
    assert near(clean.pixels.getpixel((8, 16)), (255, 0, 0), 6)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"Exif\0\0",
        b"garbage",
        exif(6, "<")[:-6],
        exif(0, "<"),
        exif(9, "<"),
        exif(6, "<").replace(b"\x08\0\0\0", b"\xff\xff\xff\xff"),
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xaa" * 40,
    ],
)
def test_corrupt_exif_is_ignored_without_a_word(block: bytes) -> None:
    stored = Image.frombytes("RGB", (5, 3), bytes(range(45)))
    data = png(5, 3, 8, 2, rows_of(stored), chunk(b"eXIf", block.removeprefix(b"Exif\0\0")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(data).sha256 == load_image(stored).sha256


def rows_of(picture: Image.Image) -> bytes:
    samples, width = picture.tobytes(), 3 * picture.width
    return b"".join(b"\0" + samples[at : at + width] for at in range(0, len(samples), width))
