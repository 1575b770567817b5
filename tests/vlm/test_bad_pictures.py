"""Pictures that are hostile, odd or damaged: a typed error or the right pixels, nothing else."""

import io
import itertools
import random
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from vlm.errors import ImageError
from vlm.images import ImageLimits, load_image


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


# Size and shape


def patched(data: bytes, mark: bytes, skip: int, new: bytes) -> bytes:
    at = data.index(mark) + skip
    return data[:at] + new + data[at + len(new) :]


def huge() -> Iterator[tuple[str, bytes]]:
    """Small files of every format whose headers declare billions of pixels, or a big canvas."""
    tiff = bytearray(encode(noise(), "TIFF"))
    start = struct.unpack("<I", tiff[4:8])[0]
    for entry in range(start + 2, start + 2 + 12 * tiff[start], 12):
        if struct.unpack("<H", tiff[entry : entry + 2])[0] in (256, 257):  # width, height
            tiff[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 500_000)
    yield "TIFF", bytes(tiff)
    side = struct.pack(">HH", 65_500, 65_500)
    yield "JPEG", patched(encode(noise(), "JPEG"), b"\xff\xc0", 5, side)
    yield "JPEG", patched(encode(noise(), "JPEG", progressive=True), b"\xff\xc2", 5, side)
    yield "GIF", patched(encode(noise(), "GIF"), b"GIF8", 6, struct.pack("<HH", 65_500, 65_500))
    yield "BMP", patched(encode(noise(), "BMP"), b"BM", 18, struct.pack("<ii", 50_000, -50_000))
    lossy = encode(noise(), "WEBP")
    yield "WEBP", patched(lossy, b"\x9d\x01\x2a", 3, struct.pack("<HH", 16_383, 16_383))
    lossless = encode(noise(), "WEBP", lossless=True)
    yield "WEBP", patched(lossless, b"VP8L", 9, struct.pack("<I", 0x0FFFFFFF))
    frames = encode(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)])
    yield "WEBP", patched(frames, b"VP8X", 12, (16_382).to_bytes(3, "little") * 2)


def test_huge_headers_of_every_format_need_no_memory() -> None:
    """All in one process of its own, by the peak of its address space."""
    script = """
        import pickle, sys
        from pathlib import Path
        from vlm.errors import ImageError
        from vlm.images import load_image

        def peak_kilobytes():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmPeak"))

        files = pickle.load(sys.stdin.buffer)
        before = peak_kilobytes()
        for name, data in files:
            try:
                load_image(data)
            except ImageError as error:
                print(name, error.code, peak_kilobytes() - before)
    """
    import pickle

    files = list(huge())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=pickle.dumps(files),
        capture_output=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [line[:2] for line in lines] == [[name, "too_many_pixels"] for name, _ in files]
    assert max(int(line[2]) for line in lines) < 32 * 1024


def test_the_size_of_webp_is_read_as_its_decoder_reads_it() -> None:
    """A wrong reading would refuse, or let through, what the decoder sees otherwise."""
    for size in ((1, 1), (40, 30), (257, 3)):
        picture = noise(size=size)
        files = [encode(picture, "WEBP", **o) for o in ({}, {"lossless": True}, {"exif": b"x"})]
        for data in files:
            pixels = size[0] * size[1]
            assert load_image(data, limits=ImageLimits(max_pixels=pixels)).size == size
            assert code_of(data, limits=ImageLimits(max_pixels=pixels - 1)) == "too_many_pixels"


def test_less_memory_than_a_picture_needs_is_an_error_with_a_code() -> None:
    script = """
        import resource
        import sys
        from pathlib import Path
        from vlm.errors import ImageError
        from vlm.images import load_image

        data = sys.stdin.buffer.read()
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, now + 2**26))
        try:
            load_image(data)
        except ImageError as error:
            print(error.code, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=encode(Image.new("1", (9_000, 9_000)), "PNG"),  # 81 MB of bytes, 324 as RGB
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().startswith("too_many_pixels the picture needs more memory")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_lines_are_refused_before_a_tower_blows_them_up(format: str) -> None:
    for size in ((1, 200), (200, 1), (3, 600)):
        assert load_image(encode(Image.new("RGB", size), format)).pixels.size == size
    for size in ((1, 201), (201, 1), (1, 2000), (2000, 1)):
        assert code_of(encode(Image.new("RGB", size), format)) == "too_thin"
        assert code_of(Image.new("RGB", size)) == "too_thin"
    assert code_of(Image.new("RGB", (1, 300)), limits=ImageLimits(max_aspect=300)) == "fine"


# Damage


def fuzz_files() -> dict[str, bytes]:
    more = {"save_all": True, "append_images": [noise(seed=1)]}
    return {
        "png": encode(noise(), "PNG"),
        "png palette": encode(noise("P"), "PNG", transparency=3),
        "png frames": encode(noise(), "PNG", **more),
        "jpeg": encode(noise(), "JPEG"),
        "jpeg progressive": encode(noise(), "JPEG", progressive=True),
        "jpeg cmyk": encode(noise("CMYK"), "JPEG"),
        "gif": encode(noise("P"), "GIF", transparency=2, **more),
        "bmp": encode(noise(), "BMP"),
        "tiff": encode(noise(), "TIFF", **more),
        "tiff lab": encode(Image.new("LAB", (9, 9)), "TIFF"),
        "webp": encode(noise(), "WEBP", **more),
        "avif": encode(noise(), "AVIF"),
    }


def test_two_thousand_damaged_files_raise_nothing_but_the_typed_error() -> None:
    chance, files = random.Random(7), fuzz_files()
    limits = ImageLimits(max_pixels=1_000_000)  # damaged headers may well declare 90 million
    seen = set()
    for whole in itertools.islice(itertools.cycle(files.values()), 2000):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            reach = min(len(data), chance.choice((64, 256, len(data))))
            data[chance.randrange(reach)] = chance.choice((0, 1, 127, 128, 255))
        try:
            load_image(bytes(data), limits=limits)
        except ImageError as error:
            seen.add(error.code)
    assert {"undecodable", "truncated"} <= seen


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {}),
        ("AVIF", {}),
    ],
)
def test_a_file_cut_anywhere_is_an_error_or_the_whole_picture(
    format: str, options: dict[str, object]
) -> None:
    data = encode(noise(size=(20, 15)), format, **options)
    whole = load_image(data).sha256
    for length in range(1, len(data), 3):
        try:
            found = load_image(data[:length]).sha256
        except ImageError as error:
            found = error.code
        assert found in {whole, "truncated", "undecodable"}


def test_strips_that_do_not_reach_the_bottom_are_damage() -> None:
    """A TIFF whose header says 60 rows and whose strips hold 30."""
    data = bytearray(encode(noise(), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(start + 2, start + 2 + 12 * data[start], 12):
        if struct.unpack("<H", data[entry : entry + 2])[0] == 257:
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 60)
    assert code_of(bytes(data)) == "truncated"
    assert code_of(Image.open(io.BytesIO(bytes(data)))) == "truncated"


def test_what_a_picture_carries_beside_its_pixels_may_be_anything() -> None:
    for key in ("transparency", "icc_profile", "exif"):
        for value in (7, 300, "text", b"\1\2", None, object(), (1, 2), [], {}):
            for mode in ("RGB", "L", "P", "LA", "CMYK", "1", "I;16", "F"):
                picture = Image.new(mode, (2, 2))
                picture.info[key] = value
                assert code_of(picture) in {"fine", "undecodable", "unsupported_mode"}
    assert code_of(png(8, 3, b"\1")) == "undecodable"  # a palette picture without a palette


def test_samples_without_a_range_or_a_number() -> None:
    for mode, value in (("F", 1e30), ("F", -5.0), ("I", -5), ("I", 2**31 - 1)):
        assert load_image(Image.new(mode, (2, 2), value)).pixels.getpixel((0, 0)) == (0, 0, 0)
    for place in range(3):  # wherever it stands
        samples = np.array([[0.0, 0.5, 1.0]], np.float32)
        samples[0, place] = np.nan
        assert code_of(Image.fromarray(samples)) == "undecodable"
