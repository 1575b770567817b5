"""Where bytes come from, and which formats they may be."""

import base64
import errno
import io
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from vlm.errors import ImageError
from vlm.images import ImageLimits, load_image

RED = Image.new("RGB", (6, 4), (250, 10, 20))


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(source: object, **options: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    # No library's words, no address of an object, no payload.
    assert not re.search(r"0x[0-9a-f]+|cannot identify|PIL\.|Errno", message), message
    assert len(message) < 400
    return caught.value


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("name", ["picture.dat", "picture.png", "picture"])
def test_content_and_not_the_name_decides_the_format(
    tmp_path: Path, format: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(encode(RED, format))
    clean = load_image(path)
    assert (clean.format, clean.size) == (format, (6, 4))
    red, green, blue = clean.pixels.getpixel((3, 2))
    assert abs(red - 250) < 12 and abs(green - 10) < 12 and abs(blue - 20) < 12


def test_path_text_bytes_and_picture_are_one(tmp_path: Path) -> None:
    data = encode(RED, "PNG")
    path = tmp_path / "red.png"
    path.write_bytes(data)
    sources = [path, str(path), data, bytearray(data), Image.open(path), RED]
    assert len({load_image(source).sha256 for source in sources}) == 1


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_image"),
        (b"some text, no picture", "undecodable"),
        (bytes(range(256)) * 8, "undecodable"),
        (b"\x89PNG\r\n\x1a\n", "undecodable"),
        (b"\xff\xd8\xff", "undecodable"),
        (b"%PDF-1.7\n", "unsupported_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"<?xml version='1.0'?>\n<svg/>", "unsupported_format"),
        (b"8BPS\x00\x01", "unsupported_format"),
        (b"SIMPLE  =                    T", "unsupported_format"),
        (encode(RED, "ICO"), "unsupported_format"),
        (encode(RED, "JPEG2000"), "unsupported_format"),
        (encode(RED, "PPM"), "undecodable"),
    ],
)
def test_bytes_that_are_no_picture_of_ours(tmp_path: Path, data: bytes, code: str) -> None:
    path = tmp_path / "innocent.png"
    path.write_bytes(data)
    assert refusal(path).code == code
    assert "innocent.png" in str(refusal(path))
    assert refusal(data).code == code


def test_postscript_starts_no_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a child process was started")

    monkeypatch.setattr("subprocess.Popen", forbidden)
    assert refusal(encode(RED, "EPS")).code == "unsupported_format"


def test_polyglot_is_read_as_the_picture_it_starts_as() -> None:
    data = encode(RED, "JPEG") + b"<html><script>alert(1)</script></html>"
    assert load_image(data).format == "JPEG"


def test_heic_without_its_decoder_names_the_extra() -> None:
    error = refusal(b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf" + bytes(64))
    installed = error.code == "undecodable"  # the bytes hold nothing after the brand
    assert installed or ("vlm[heic]" in str(error) and error.code == "unsupported_format")


def test_paths_that_are_no_pictures(tmp_path: Path) -> None:
    loop, pipe = tmp_path / "loop.png", tmp_path / "pipe.png"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    expected = {
        tmp_path: "unreadable",
        loop: "unreadable",
        pipe: "unreadable",  # and returns at once instead of waiting for a writer
        Path("/dev/null"): "unreadable",
        tmp_path / "absent.png": "missing",
        tmp_path / "absent.png" / "child.png": "missing",
        tmp_path / ("n" * 300): "unreadable",
        "": "missing",
        "nul\0byte.png": "unreadable",
        "line\nbreak.png": "missing",
    }
    assert {path: refusal(path).code for path in expected} == expected


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is simulated: to root, every file is readable."""

    def denied(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "secret.png"
    path.write_bytes(encode(RED, "PNG"))
    monkeypatch.setattr("vlm.image_bytes.os.open", denied)
    error = refusal(path)
    assert error.code == "unreadable" and "permissions" in str(error)


def test_refusals_leak_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        refusal(tmp_path)
        refusal("/dev/null")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "url", ["http://host/a.png", "https://host/a.png", "HTTP://host", "file:///etc/passwd"]
)
def test_urls_are_not_fetched(url: str) -> None:
    assert refusal(url).code == "remote_url"


@pytest.mark.parametrize("source", [None, 7, ["a.png"], object()])
def test_a_source_of_another_type(source: object) -> None:
    assert refusal(source).code == "unsupported_source"


def test_byte_cap(tmp_path: Path) -> None:
    data = encode(RED, "PNG")
    path = tmp_path / "red.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, data, uri):
        assert load_image(source, limits=ImageLimits(max_bytes=len(data))).size == (6, 4)
        error = refusal(source, limits=ImageLimits(max_bytes=len(data) - 1))
        assert error.code == "too_many_bytes"


def test_a_sparse_file_over_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte: reading it would end the test
    assert refusal(path).code == "too_many_bytes"


def test_data_uris_follow_rfc_2397() -> None:
    data = encode(RED, "PNG")
    text = base64.b64encode(data).decode()
    escaped = "".join(f"%{byte:02X}" for byte in data)
    for uri in (
        f"data:image/png;base64,{text}",
        f"DATA:image/png;BASE64,{text}",
        f"data:;base64,{text}",
        f"data:text/plain;charset=utf-8;base64,{text}",  # content decides, not the claim
        f"data:image/png;base64,{text[:8]}\n {text[8:]}",
        f"data:image/png,{escaped}",
    ):
        assert load_image(uri).sha256 == load_image(data).sha256


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("data:image/png;base64", "bad_data_uri"),
        ("data:image/png;base64,A", "bad_data_uri"),
        ("data:image/png;base64,____", "bad_data_uri"),
        ("data:image/png;base64,", "empty_image"),
        ("data:image/png,hello", "undecodable"),
    ],
)
def test_bad_data_uris(uri: str, code: str) -> None:
    assert refusal(uri).code == code
