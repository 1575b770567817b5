"""From a path, a ``data:`` URI or bytes to bounded bytes of a known format; imports no decoder.

The format comes from the first bytes alone: a file's name and the type that a
client claims are never believed.
"""

import base64
import binascii
import errno
import os
import stat
import urllib.parse

from vlm.errors import ImageError

_FORMATS_READ = "JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)

# Named in the refusal, so that the user knows that the file itself is sound.
_REFUSED_MAGIC = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"SIMPLE  =", "FITS"),
    (b"\x00\x00\x01\x00", "Windows icon"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
)

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}

# A FIFO without a writer must not hang the open; Windows has neither flag nor FIFO.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_OS_REASONS = {
    errno.ENOENT: ("missing", "does not exist; check the path"),
    errno.ENOTDIR: ("missing", "does not exist; check the path"),
    errno.ELOOP: ("unreadable", "is a symbolic link that leads back to itself; pass the real file"),
    errno.EACCES: ("unreadable", "may not be read by this user; change its permissions"),
    errno.EISDIR: ("unreadable", "is a folder; pass a picture in it, or use `vlm caption`"),
    errno.ENAMETOOLONG: ("unreadable", "has a name that is too long; shorten it"),
}


def read_path(path: str, max_bytes: int) -> bytes:
    """Read a local picture file, or decode a ``data:`` URI, of at most `max_bytes`.

    Raises:
        ImageError: ``missing``, ``unreadable`` (a folder, a device, no permission),
            ``too_many_bytes``, ``remote_url`` or ``bad_data_uri``.
    """
    scheme = path[:8].lower()
    if scheme.startswith("data:"):
        return _read_data_uri(path, max_bytes)
    if scheme.startswith(("http://", "https://", "file://", "ftp://")):
        raise ImageError(
            f"{shorten(path)} is a URL, and URLs are not fetched; download it and pass the file",
            "remote_url",
        )
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise ImageError(f"{shorten(path)} is no possible file name", "unreadable") from error
    except OSError as error:
        code, reason = _OS_REASONS.get(
            error.errno or 0, ("unreadable", "cannot be opened; check the path")
        )
        raise ImageError(f"{shorten(path)} {reason}", code) from error
    try:
        return _read_open_file(descriptor, path, max_bytes)
    finally:
        os.close(descriptor)


def _read_open_file(descriptor: int, path: str, max_bytes: int) -> bytes:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{shorten(path)} {_OS_REASONS[errno.EISDIR][1]}", "unreadable")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{shorten(path)} is no regular file; pass a picture file", "unreadable")
    check_bytes(status.st_size, max_bytes, shorten(path))
    try:
        chunks = [os.read(descriptor, status.st_size + 1)]
        while chunks[-1] and sum(map(len, chunks)) <= max_bytes:
            if len(chunks) == 1 and len(chunks[0]) == status.st_size:
                break  # the usual case: one read, as long as announced
            chunks.append(os.read(descriptor, 1 << 20))
    except OSError as error:
        raise ImageError(f"{shorten(path)} cannot be read; check the disk", "unreadable") from error
    data = b"".join(chunks)
    check_bytes(len(data), max_bytes, shorten(path))
    return data


def _read_data_uri(uri: str, max_bytes: int) -> bytes:
    """Decode ``data:[type][;parameters][;base64],payload`` (RFC 2397)."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError("the data: URI has no comma before its data", "bad_data_uri")
    check_bytes(len(payload) // 3, max_bytes, "the data: URI")  # before it is copied
    raw = urllib.parse.unquote_to_bytes(payload)
    if header.lower().rstrip().endswith(";base64"):
        try:
            raw = base64.b64decode(b"".join(raw.split()), validate=True)
        except binascii.Error as error:
            raise ImageError("the data: URI holds no valid base64", "bad_data_uri") from error
    check_bytes(len(raw), max_bytes, "the data: URI")
    return raw


def check_bytes(size: int, max_bytes: int, name: str) -> None:
    """Raise ``too_many_bytes`` when `size` is over the cap."""
    if size > max_bytes:
        raise ImageError(
            f"{name} has {size:,} bytes, over the limit of {max_bytes:,}; save a smaller copy",
            "too_many_bytes",
        )


def sniff(data: bytes, name: str) -> str:
    """Tell the format from the content: a Pillow format name, or ``"HEIC"``.

    Raises:
        ImageError: ``empty_image``, ``unsupported_format`` (a known format that is
            not read) or ``undecodable``.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); save or download it again", "empty_image")
    for magic, found in _MAGIC:
        if data.startswith(magic):
            return found
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    found_box = _sniff_box(data)
    if found_box is not None:
        return found_box
    refused = _sniff_refused(data)
    if refused is not None:
        raise ImageError(
            f"{name} is a {refused} file, which is not read; save it as {_FORMATS_READ}",
            "unsupported_format",
        )
    raise ImageError(
        f"{name} is no picture that can be read; pass a {_FORMATS_READ} file", "undecodable"
    )


def _sniff_box(data: bytes) -> str | None:
    """AVIF and HEIC share one container; its brands tell them apart (ISO/IEC 23008-12)."""
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4], "big"), 256, len(data))
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else None


def _sniff_refused(data: bytes) -> str | None:
    for magic, found in _REFUSED_MAGIC:
        if data.startswith(magic):
            return found
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<!doctype svg")):
        return "SVG"
    return "SVG" if head.startswith((b"<?xml", b"<!--")) and b"<svg" in head else None


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP file declares; None where its first chunk is unknown.

    Read here because the decoder asks for a whole canvas before it can be asked.
    Layout: https://developers.google.com/speed/webp/docs/riff_container and RFC 9649.
    """
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = (int.from_bytes(body[at : at + 2], "little") for at in (6, 8))
        return width & 0x3FFF, height & 0x3FFF
    return None


def shorten(path: str) -> str:
    """Quote `path` on one line, with the middle of a long one left out."""
    text = repr(path)
    return text if len(text) <= 160 else f"{text[:100]}...{text[-50:]}"
