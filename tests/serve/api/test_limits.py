"""How much is taken: of one request in bytes and seconds, and of all together."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve.api.limits import Limits
from serve.app import running
from vlm.assistant import Assistant
from vlm.images import ImageLimits

LIMITS = Limits(
    body_bytes=200_000,
    body_seconds=0.5,
    images=ImageLimits(max_bytes=20_000, max_pixels=10_000),
    requests=3,
    held_bytes=250_000,
)


@pytest.fixture(scope="module")
def url(tiny_model: Assistant) -> Iterator[str]:
    with running(tiny_model, port=0, limits=LIMITS) as address:
        yield address


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **changes}


def post(url: str, **changes: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body(**changes))


def under_way(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("vlm_requests_under_way "))


def open_request(url: str, *headers: str) -> socket.socket:
    """A request whose body is still to come."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=10)
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {address.netloc}",
        "Content-Type: application/json",
        *headers,
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(4096).split()[1])


def test_an_announced_length_is_refused_before_a_byte_of_it(url: str) -> None:
    with open_request(url, "Content-Length: 500000000") as connection:
        assert status_of(connection) == 413


def test_a_length_that_nobody_announced_is_refused_while_it_comes(url: str) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with open_request(url, "Transfer-Encoding: chunked") as connection:
        connection.sendall(chunk * 7)  # 229,376 bytes, and more to come
        assert status_of(connection) == 413
        sent = 0
        try:
            while sent < 500_000_000:  # it does not come to that
                connection.sendall(chunk)
                sent += len(chunk)
        except OSError:  # the server has hung up
            pass
        assert sent < 100_000_000
    wait_until_idle(url)


def test_what_comes_too_slowly_is_given_up(url: str) -> None:
    with open_request(url, "Content-Length: 1000") as connection:
        deadline = time.monotonic() + 10
        connection.sendall(b'{"model"')
        while under_way(url) == 0:
            assert time.monotonic() < deadline
        assert status_of(connection) == 408
    wait_until_idle(url)


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 10
    while under_way(url):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_picture_that_is_too_long_or_too_large(url: str, tiny: Any) -> None:
    long = tiny.about(b"x" * 21_000, "what?")
    reply = post(url, messages=long)
    assert tiny.told(reply) == (413, "too_many_bytes", "messages.0.content.0")
    large = tiny.about(tiny.drawn(1, (101, 100)), "what?")
    assert tiny.told(post(url, messages=large))[:2] == (413, "too_many_pixels")
    assert post(url, messages=tiny.about(tiny.drawn(1, (100, 100)), "?"), max_tokens=1).is_success


def test_more_requests_than_places_are_refused_and_told_when_to_come_again(
    url: str, tiny: Any
) -> None:
    waiting = [open_request(url, "Content-Length: 1000") for _ in range(3)]
    try:
        deadline = time.monotonic() + 10
        while under_way(url) < 3:
            assert time.monotonic() < deadline
        reply = post(url)
        assert tiny.told(reply)[:2] == (429, "queue_full")
        assert int(reply.headers["retry-after"]) > 0
    finally:
        for connection in waiting:
            connection.close()
    wait_until_idle(url)
    assert post(url, max_tokens=1).is_success


def test_more_bytes_than_all_may_hold_are_refused(url: str, tiny: Any) -> None:
    waiting = open_request(url, "Content-Length: 199999")
    try:
        waiting.sendall(b" " * 190_000)
        while under_way(url) < 1:
            pass
        reply = httpx.post(
            f"{url}/v1/chat/completions",
            content=b" " * 150_000,
            headers={"content-type": "application/json"},
        )
        assert tiny.told(reply)[:2] == (503, "overloaded")
        assert int(reply.headers["retry-after"]) > 0
    finally:
        waiting.close()
    wait_until_idle(url)
    for _ in range(12):  # 30,000 bytes of pixels each, given back each time
        assert post(
            url, messages=tiny.about(tiny.drawn(1, (100, 100)), "?"), max_tokens=1
        ).is_success


def test_all_who_wait_are_answered_in_turn(tiny: Any) -> None:
    found: list[int] = []
    clients = [
        threading.Thread(target=lambda: found.append(tiny.post(max_tokens=5).status_code))
        for _ in range(60)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    assert found == [200] * 60


def test_only_json_is_taken(url: str, tiny: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        reply = httpx.post(
            f"{url}/v1/chat/completions", content=b"{}", headers={"content-type": kind}
        )
        assert tiny.told(reply)[:2] == (415, "unsupported_media_type")
