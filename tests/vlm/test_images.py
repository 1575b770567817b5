"""The gate itself: caps, truncation, frames, draft, identity."""

import io
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageFile

from vlm.errors import ImageError
from vlm.images import CleanImage, ImageLimits, load_image


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int = 320, height: int = 240) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise((width, height), 60) for _ in range(3)])


def code_of(data: object, **options: object) -> str:
    try:
        load_image(data, **options)
    except ImageError as error:
        return error.code
    return "fine"


def bomb(width: int, height: int) -> bytes:
    """A PNG of some 60 bytes that declares any size, written by hand."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_declared_pixels_are_capped_before_decoding() -> None:
    for size in ((20_000, 20_000), (12_000, 12_000), (100_000_001, 1)):
        assert code_of(bomb(*size)) == "too_many_pixels"


def test_a_bomb_needs_no_memory() -> None:
    """20000 x 20000 would take 1.2 GB; a process of its own shows its own peak.

    The peak of the address space, so that memory asked for and never touched counts too.
    """
    script = """
        import sys
        from pathlib import Path
        from vlm.errors import ImageError
        from vlm.images import load_image

        def peak_kilobytes():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))

        data = sys.stdin.buffer.read()
        before = peak_kilobytes()
        try:
            load_image(data)
        except ImageError as error:
            print(error.code, peak_kilobytes() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, input=bomb(20_000, 20_000), capture_output=True, check=True)
    code, kilobytes = done.stdout.decode().split()
    assert code == "too_many_pixels"
    assert int(kilobytes) < 32 * 1024


def test_our_cap_decides_and_not_pillows() -> None:
    """95 million pixels are over Pillow's warning line and under ours."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_of(bomb(9_500, 10_000)) == "truncated"  # let through, and has no data
        picture = encode(Image.new("1", (9_500, 10_000)), "PNG")
        assert load_image(picture).size == (9_500, 10_000)
    assert before == Image.MAX_IMAGE_PIXELS
    wide = ImageLimits(max_pixels=200_000_000)
    assert code_of(bomb(13_500, 14_000), limits=wide) == "truncated"  # past Pillow's error line
    assert code_of(noise(), limits=ImageLimits(max_pixels=320 * 240 - 1)) == "too_many_pixels"
    assert code_of(noise(), limits=ImageLimits(max_pixels=320 * 240)) == "fine"


def test_gif_whose_frame_is_larger_than_its_screen() -> None:
    """Pillow grows the picture to the frame and then applies its own limit."""
    frame = struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    data = (
        b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b"," + frame + b"\x02\x02\x4c\x01\0;"
    )
    assert code_of(data) == "too_many_pixels"


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("AVIF", {}),
    ],
)
def test_truncated_files_are_never_half_a_picture(
    format: str, options: dict[str, object], tolerant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with Pillow told, as training scripts do, to paint the rest grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = encode(noise(), format, **options)
    assert code_of(data) == "fine"
    for length in (len(data) // 2, len(data) * 9 // 10, len(data) - 128):
        assert code_of(data[:length]) in {"truncated", "undecodable"}


def test_damage_in_the_middle() -> None:
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert code_of(bytes(data)) == "truncated"


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1)])
def test_the_smallest_pictures_are_fine(size: tuple[int, int]) -> None:
    for format in ("PNG", "JPEG", "WEBP"):
        assert load_image(encode(Image.new("RGB", size), format)).pixels.size == size


def test_a_picture_without_pixels() -> None:
    assert code_of(Image.new("RGB", (0, 5))) == "empty_image"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_first_frame_only(format: str) -> None:
    colours = [(230, 20, 30), (20, 230, 30), (20, 30, 230)]
    frames = [Image.new("RGB", (32, 32), colour) for colour in colours]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    clean = load_image(data)
    assert clean.animated
    assert not load_image(encode(frames[0], format)).animated
    pixel = clean.pixels.getpixel((16, 16))
    assert max(abs(a - b) for a, b in zip(pixel, colours[0], strict=True)) < 12


def test_later_frames_are_not_decoded() -> None:
    """Garbage in the second frame's data does no harm: nobody looks at it."""
    frames = [noise(64, 64).convert("P", dither=0) for _ in range(2)]
    single = encode(frames[0], "GIF")
    data = bytearray(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    second = data.rindex(b"!\xf9\x04")  # the extension that opens the second frame
    data[second + 850 :] = b"\xff" * 50  # past its header and palette
    clean = load_image(bytes(data))
    assert clean.animated
    assert clean.sha256 == load_image(single).sha256


def test_draft_keeps_both_sides_long_enough() -> None:
    photo = noise(800, 600).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(photo, "JPEG", quality=95)
    clean = load_image(data, draft_to=224)
    assert clean.size == (1600, 1200)
    assert clean.pixels.size == (400, 300)  # an eighth would be 200 x 150
    assert load_image(data, draft_to=2000).pixels.size == (1600, 1200)
    assert clean.is_drafted and not load_image(data).is_drafted
    png = encode(photo, "PNG")
    assert load_image(png, draft_to=224).sha256 == load_image(png).sha256
    assert clean.sha256 != load_image(data).sha256  # other pixels, other cache key


def test_identity_knows_size_and_not_encoding() -> None:
    samples = bytes(range(0, 240, 10)) * 3
    wide = Image.frombytes("RGB", (12, 2), samples)
    tall = Image.frombytes("RGB", (2, 12), samples)
    assert load_image(wide).sha256 != load_image(tall).sha256
    assert load_image(wide).sha256 == load_image(encode(wide, "PNG")).sha256
    assert load_image(wide).sha256 == load_image(encode(wide, "BMP")).sha256


def test_clean_pictures_pass_through_and_share_nothing() -> None:
    source = noise(8, 8)
    clean = load_image(source)
    assert isinstance(clean, CleanImage)
    assert load_image(clean) is clean
    before = clean.sha256
    source.paste((1, 2, 3), (0, 0, 8, 8))
    assert load_image(clean.pixels.copy()).sha256 == before
    assert type(clean.pixels) is Image.Image and clean.pixels.mode == "RGB"
    assert not load_image(encode(noise(8, 8), "PNG", dpi=(72, 72))).pixels.info


def test_many_threads_agree() -> None:
    data = [encode(noise(64, 64), "PNG") for _ in range(8)]
    alone = [load_image(item).sha256 for item in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda item: load_image(item).sha256, data * 10))
    assert together == alone * 10
