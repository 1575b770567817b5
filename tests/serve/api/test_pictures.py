"""Pictures that a client sends: what is one is read, what is none has its status and code."""

import dataclasses
import io
import socket
import struct
import zlib
from typing import Any

import pytest
from PIL import Image

from serve.app import running
from serve.cli import main
from vlm.errors import ImageError
from vlm.remote import fetch_picture


def encoded(kind: str, size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, kind, **options)
    return out.getvalue()


def huge_header(side: int) -> bytes:
    """A PNG of a few bytes that declares side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def with_url(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "empty_image"),
        (b"no picture", 400, "undecodable"),
        (encoded("PNG", (300, 300))[:200], 400, "truncated"),
        (encoded("JPEG", (300, 300))[:-128], 400, "truncated"),
        (huge_header(20_000), 413, "too_many_pixels"),
        (huge_header(9_000), 413, "too_many_pixels"),
        (encoded("PNG", (1, 2000)), 422, "too_thin"),
        (b"%PDF-1.7", 415, "unsupported_format"),
        (b"<svg xmlns='x'/>", 415, "unsupported_format"),
    ],
)
def test_pictures_that_are_none(tiny: Any, data: bytes, status: int, code: str) -> None:
    messages = with_url(tiny.data_uri(data))
    assert tiny.refused(messages=messages) == (status, code, "messages.0.content.0")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_formats_by_their_content_whatever_the_client_says(tiny: Any, kind: str) -> None:
    messages = with_url(tiny.data_uri(encoded(kind), "text/html"))
    assert tiny.post(messages=messages, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        "data:;base64,",
        "DATA:image/png;BASE64,",
        "data:image/png;charset=utf-8;base64,",
        "data:image/png;name=a b;base64,",
    ],
)
def test_forms_of_data_uris(tiny: Any, head: str) -> None:
    payload = tiny.data_uri(encoded("PNG")).partition(",")[2]
    spaced = payload[:20] + " \n" + payload[20:]
    for text in (payload, spaced):
        assert tiny.post(messages=with_url(head + text), max_tokens=1).status_code == 200


def test_a_data_uri_without_base64(tiny: Any) -> None:
    percent = "".join(f"%{byte:02x}" for byte in encoded("PNG"))
    assert tiny.post(messages=with_url(f"data:image/png,{percent}"), max_tokens=1).is_success


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64",
        "data:image/png;base64,a",
        "data:image/png;base64,ab-_",
        "data:image/png;base64,@@@@",
        "data:image/png;base64,iVBORw0KGgo",
    ],
)
def test_broken_data_uris(tiny: Any, url: str) -> None:
    assert tiny.refused(messages=with_url(url)) == (400, "bad_data_uri", "messages.0.content.0")


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "../x.png",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "ftp://a/b.png",
        "",
        " data:,x",
        "javascript:alert(1)",
        "~/x.png",
    ],
)
def test_files_of_the_machine_are_not_opened(tiny: Any, url: str) -> None:
    told = tiny.refused(messages=with_url(url))
    assert told == (400, "bad_image_url", "messages.0.content.0")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://[::1]/x.png",
        "http://169.254.169.254/latest",
        "http://0x7f000001/",
        "HTTPS://example.com/x.png",
        "http://good\\@evil/",
    ],
)
def test_addresses_are_not_fetched(tiny: Any, url: str) -> None:
    reply = tiny.post(messages=with_url(url))
    assert tiny.told(reply) == (422, "remote_url", "messages.0.content.0")
    assert "data:" in reply.json()["error"]["message"]


def test_addresses_go_to_who_fetches_them(tiny: Any) -> None:
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        if "private" in url:
            raise ImageError("a private address", "private_address")
        if "gone" in url:
            raise ImageError("no such name", "fetch_failed")
        return tiny.drawn(5) if url.endswith(".png") else b"<html>"

    with running(tiny.model, port=0, fetch=fetch) as url:
        api = dataclasses.replace(tiny, url=url)
        fetched = api.post(messages=with_url("https://a.b/x.png"), max_tokens=5).json()
        sent = api.post(messages=with_url(tiny.data_uri(tiny.drawn(5))), max_tokens=5).json()
        assert fetched["choices"] == sent["choices"]
        for path, status, code in (
            ("private.png", 422, "private_address"),
            ("gone.png", 502, "fetch_failed"),
            ("page", 400, "undecodable"),
        ):
            told = api.refused(messages=with_url(f"http://a.b/{path}"))
            assert told == (status, code, "messages.0.content.0")
        assert api.refused(messages=with_url("file:///etc/passwd"))[1] == "bad_image_url"
    assert len(asked) == 4


def test_allowed_addresses_are_public_ones(tiny: Any) -> None:
    """Of a server on this machine, that nobody connects to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        port = listening.getsockname()[1]
        with running(tiny.model, port=0, fetch=fetch_picture) as url:
            api = dataclasses.replace(tiny, url=url)
            for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
                told = api.refused(messages=with_url(f"http://{host}:{port}/x.png"))
                assert told == (422, "private_address", "messages.0.content.0")
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize("words", [[], ["--allow-remote-images"]])
def test_the_command_allows_them_where_it_is_told_to(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("serve.app.launch", lambda *_, **options: given.update(options))
    monkeypatch.setattr("sys.argv", ["vlm", "serve", *words])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert (given["fetch"] is not None) == bool(words)


def test_one_picture_twice_is_shown_twice_and_encoded_once(tiny: Any) -> None:
    part = with_url(tiny.data_uri(tiny.drawn(77)))[0]["content"]
    before = tiny.model.engine.cache.misses
    reply = tiny.post(messages=[{"role": "user", "content": [part[0], *part]}], max_tokens=1).json()
    tokens = reply["usage"]["prompt_tokens_details"]["image_tokens"]
    assert tokens == 2 * tiny.model.processor.num_visual_tokens
    assert tiny.model.engine.cache.misses == before + 1
    tiny.post(messages=with_url(tiny.data_uri(tiny.drawn(77))), max_tokens=1)
    assert tiny.model.engine.cache.misses == before + 1


def test_errors_quote_no_payload(tiny: Any) -> None:
    secret = "c2VjcmV0c2VjcmV0"
    reply = tiny.post(messages=with_url(f"data:image/png;base64,{secret}"))
    assert reply.status_code == 400 and secret not in reply.text
