"""Pictures from the web: a server on loopback that is allowed, and addresses that are not."""

import io
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from vlm.errors import ImageError
from vlm.images import ImageLimits
from vlm.remote import Network, fetch_picture, is_public
from vlm.testing import draw_image


def png() -> bytes:
    file = io.BytesIO()
    draw_image((4, 3)).save(file, "PNG")
    return file.getvalue()


PNG = png()


class Handler(BaseHTTPRequestHandler):
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Host")))
        name = self.path.split("?")[0].strip("/")
        if name == "slow":
            self.answer(200, None, 100)
            for _ in range(100):
                self.wfile.write(b"\x89")
                time.sleep(0.05)
        elif name.startswith("to:"):
            self.answer(302, b"", 0, name[3:].replace("!", "/"))
        elif name == "loop":
            self.answer(302, b"", 0, "/loop")
        elif name == "gone":
            self.answer(404, b"x", 1)
        elif name == "cut":
            self.answer(200, PNG[:-9], len(PNG))
        elif name == "endless":
            self.answer(200, PNG + bytes(10_000), None)
        elif name == "declared":
            self.answer(200, None, 10**12)
        else:
            bodies = {"a.png": PNG, "empty": b"", "page": b"<!doctype html><p>Hi"}
            self.answer(200, bodies[name], len(bodies[name]))

    def answer(
        self, status: int, body: bytes | None, size: int | None, place: str | None = None
    ) -> None:
        self.send_response(status)
        if size is not None:
            self.send_header("Content-Length", str(size))
        if place:
            self.send_header("Location", place)
        self.end_headers()
        if body:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is no news."""


class Net:
    """Names by a table; loopback stands for the public address 8.8.8.8."""

    def __init__(self, port: int = 1, **names: Sequence[str]) -> None:
        self.names = {"pictures": ["8.8.8.8"], **names}
        self.port = port
        self.looked_up: list[str] = []
        self.tried: list[str] = []

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.looked_up.append(host)
        if host not in self.names:
            raise socket.gaierror("no such name")
        return self.names[host]

    def connect(self, place: tuple[str, int], seconds: float) -> socket.socket:
        self.tried.append(place[0])
        assert is_public(place[0])
        return socket.create_connection(("127.0.0.1", self.port), seconds)

    @property
    def network(self) -> Network:
        return Network(self.resolve, connect=self.connect)


@pytest.fixture
def net() -> Iterator[Net]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Net(server.server_port)
    server.shutdown()
    server.server_close()


def refusal(url: str, net: Net, **options: Any) -> str:
    with pytest.raises(ImageError) as error:
        fetch_picture(url, network=net.network, **options)
    assert "\n" not in str(error.value)
    return error.value.code


def test_a_picture_comes_from_the_address_that_was_checked(net: Net) -> None:
    assert fetch_picture("http://pictures:8080/a.png?x=1#y", network=net.network) == PNG
    assert Handler.seen[-1] == ("/a.png?x=1", "pictures:8080")
    assert (net.looked_up, net.tried) == (["pictures"], ["8.8.8.8"])


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.31.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1",
     "0.0.0.0", "224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fd00::1", "fec0::1", "ff02::1",
     "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"],
)  # fmt: skip
def test_private_addresses_are_never_connected_to(address: str) -> None:
    assert not is_public(address)
    net = Net(pictures=["8.8.8.8", address])  # one of several is enough
    assert refusal("https://pictures/a.png", net) == "private_address"
    assert net.tried == []


@pytest.mark.parametrize("host", ["127.0.0.1", "0x7f000001", "2130706433", "[::1]", "localhost"])
def test_the_own_machine_by_any_spelling(host: str) -> None:
    tried: list[Any] = []
    with pytest.raises(ImageError) as error:
        fetch_picture(
            f"http://{host}/a.png", network=Network(connect=lambda *place: tried.append(place))
        )
    assert (error.value.code, tried) == ("private_address", [])


@pytest.mark.parametrize(
    "url",
    ["http://good\\@evil/", "http://a@b.c/", "http://a:b@c/", "http://ex ample/", "http://a\n.b/",
     "ftp://a/b", "file:///etc/passwd", "//a/b", "http:///x", "http://b\u00fccher.de/",
     "http://a:99999/", "http://[fe80::1%25eth0]/", "http://[::1", "data:image/png;base64,"],
)  # fmt: skip
def test_addresses_that_parsers_read_differently(url: str) -> None:
    net = Net()
    assert refusal(url, net) == "remote_url"
    assert net.looked_up == []


def test_each_redirect_is_checked(net: Net) -> None:
    net.names["inside"] = ["10.0.0.1"]
    assert fetch_picture("http://pictures/to:a.png", network=net.network) == PNG
    assert refusal("http://pictures/to:http:!!inside!a.png", net) == "private_address"
    assert refusal("http://pictures/to:http:!!127.0.0.1!a.png", net) == "fetch_failed"
    net.names["127.0.0.1"] = ["127.0.0.1"]
    assert refusal("http://pictures/to:http:!!127.0.0.1!a.png", net) == "private_address"
    assert refusal("http://pictures/to:file:!!!etc!passwd", net) == "remote_url"
    assert set(net.tried) == {"8.8.8.8"}
    before = len(net.tried)
    assert refusal("http://pictures/loop", net) == "fetch_failed"
    assert len(net.tried) - before == 4


@pytest.mark.parametrize(
    ("name", "code"),
    [("gone", "fetch_failed"), ("cut", "fetch_failed"), ("empty", "empty_image"),
     ("page", "undecodable"), ("endless", "too_many_bytes"), ("declared", "too_many_bytes")],
)  # fmt: skip
def test_answers_that_are_no_picture(name: str, code: str, net: Net) -> None:
    limits = ImageLimits(max_bytes=5_000)
    assert refusal(f"http://pictures/{name}", net, limits=limits) == code


def test_slow_answers_are_cut(net: Net) -> None:
    with pytest.raises(ImageError, match=r"it takes over 0\.2 s|are missing") as error:
        fetch_picture("http://pictures/slow", seconds=0.2, network=net.network)
    assert error.value.code == "fetch_failed"


def test_names_and_servers_that_are_not_there(net: Net) -> None:
    assert refusal("http://nowhere/a.png", net) == "fetch_failed"
    assert refusal("https://pictures/a.png", net) == "fetch_failed"  # it speaks no TLS
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        net.port = taken.getsockname()[1]
        assert refusal("http://pictures/a.png", net) == "fetch_failed"
