"""Fetch a picture from the web, from public addresses alone.

A name is looked up once, all its addresses must be public, and the connection goes to one
of those that were checked, so that a name that changes its address in between leads nowhere
else. Each redirect is checked anew. Proxies of the environment are not used: they would look
the name up themselves.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vlm.errors import ImageError
from vlm.image_bytes import check_bytes, shorten, sniff
from vlm.images import DEFAULT_LIMITS, ImageLimits

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_SILENCE = 10.0  # seconds without a byte
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?|[0-9a-f:.]*:[0-9a-f:.]*")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are IPv4
_HEADERS = {"User-Agent": "vlm", "Accept": "image/*", "Accept-Encoding": "identity"}


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, by what it embeds as well.

    >>> [is_public(a) for a in ("8.8.8.8", "127.0.0.1", "::ffff:10.0.0.1", "100.64.0.1")]
    [True, False, False, False]
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inside = found.ipv4_mapped or found.sixtofour or (found.teredo or [None])[-1]
        if found in _NAT64:
            inside = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inside is not None:
            return is_public(str(inside))
        if found.is_site_local:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved)


def _resolve(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]).partition("%")[0] for each in found]


@dataclass(frozen=True)
class Network:
    """How names are looked up, which addresses are allowed, and how one is connected to."""

    resolve: Callable[[str, int], Sequence[str]] = _resolve
    allows: Callable[[str], bool] = is_public
    connect: Callable[[tuple[str, int], float], socket.socket] = socket.create_connection


PUBLIC = Network()


def fetch_picture(
    url: str,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    seconds: float = 30.0,
    network: Network = PUBLIC,
) -> bytes:
    """The bytes of a picture; its format is known, its pixels are not decoded.

    Args:
        url: of http or https.
        limits: `max_bytes` ends a download that is longer.
        seconds: for all of it.
        network: others in tests.

    Raises:
        ImageError: ``remote_url`` (no plain address of http or https), ``private_address``,
            ``fetch_failed`` (no such name, no answer, an error status, too many redirects, too
            slow, cut off), ``too_many_bytes``, ``empty_image``, ``unsupported_format`` or
            ``undecodable`` (a web page, for example).
    """
    end = time.monotonic() + seconds
    place = url
    for _ in range(_MAX_REDIRECTS + 1):
        try:
            found = _get(place, limits.max_bytes, end, network)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            late = f"it takes over {seconds:g} s" if time.monotonic() >= end else str(error)
            reason = " ".join(late.split()) or type(error).__name__
            raise _failed(place, reason) from error
        if isinstance(found, bytes):
            sniff(found, shorten(url))
            return found
        place = urllib.parse.urljoin(place, found)
    raise _failed(url, f"over {_MAX_REDIRECTS} redirects")


def _failed(url: str, reason: str) -> ImageError:
    text = f"{shorten(url)} cannot be fetched ({reason}); download it and pass the file"
    return ImageError(text, "fetch_failed")


def _get(url: str, max_bytes: int, end: float, network: Network) -> bytes | str:
    """The body, or where a redirect leads."""
    parts, host, port = _split(url)
    with _connected(url, host, port, end, network) as sock:
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(
                sock, server_hostname=host, do_handshake_on_connect=False
            )
        with sock, _cut_at(sock, end):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock, connection.auto_open = sock, 0
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Host": parts.netloc, **_HEADERS})
            return _answer(url, connection.getresponse(), max_bytes)


def _answer(url: str, response: http.client.HTTPResponse, max_bytes: int) -> bytes | str:
    place = response.getheader("Location")
    if response.status in _REDIRECTS and place:
        return place
    if response.status != 200:
        raise _failed(url, f"the server answers {response.status}")
    check_bytes(response.length or 0, max_bytes, shorten(url))
    pieces: list[bytes] = []
    size = 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        check_bytes(size, max_bytes, shorten(url))
    if response.length:
        raise _failed(url, f"{response.length:,} bytes of it are missing")
    return b"".join(pieces)


def _split(url: str) -> tuple[urllib.parse.SplitResult, str, int]:
    """Parts, host and port of an address about which no two parsers can disagree."""
    is_plain = url.isascii() and url.isprintable() and not set(url) & set(' \\"<>^`{|}')
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        is_plain = False
    if not (is_plain and port and _HOST.fullmatch(host) and "@" not in parts.netloc):
        raise ImageError(
            f"{shorten(url)} is no plain address of http or https; write names in ASCII, other "
            "signs as %XX, and no user name",
            "remote_url",
        )
    return parts, host, port


@contextlib.contextmanager
def _connected(
    url: str, host: str, port: int, end: float, network: Network
) -> Iterator[socket.socket]:
    addresses = list(dict.fromkeys(network.resolve(host, port)))
    for address in addresses:
        if not network.allows(address):
            reason = f"leads to {address}, which is no public address"
            raise ImageError(f"{shorten(url)} {reason}; pass the file", "private_address")
    error: OSError = OSError("the name has no address")
    for address in addresses:
        try:
            seconds = min(_SILENCE, end - time.monotonic())
            if seconds <= 0:
                raise TimeoutError("no time is left")
            sock = network.connect((address, port), seconds)
            break
        except OSError as found:
            error = found
    else:
        raise error
    with sock:
        yield sock


@contextlib.contextmanager
def _cut_at(sock: socket.socket, end: float) -> Iterator[None]:
    """End the connection at a time, however slowly bytes still come."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, end - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
