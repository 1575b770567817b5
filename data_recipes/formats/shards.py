"""Samples of webdataset shards: files of a tar or zip archive that have one key.

Nothing is extracted to disk. A member that is a link or device, or whose name is absolute
or has ``..``, is reported and passed over; so is one that is too large.
"""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_recipes.formats.captions import KEY
from data_recipes.formats.faults import Fault, FaultError, Report
from data_recipes.formats.text_files import Found, open_bytes
from vlm.captioning import SUFFIXES
from vlm.errors import RecordError
from vlm.images import DEFAULT_LIMITS

_MAX_TEXT_BYTES = 2**20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError)


def samples(path: Path, report: Report) -> Iterator[Found]:
    """Rows ``{"__key__", "jpg", "txt", ...}`` of bytes, one a key.

    Raises:
        FaultError: ``truncated``: the archive ends too early or is damaged.
    """
    key, group = "", dict[str, Any]()
    try:
        members = _zip(path, report) if zipfile.is_zipfile(path) else _tar(path, report)
        for name, data in members:
            folder, base = os.path.split(name)
            stem, _, suffix = base.partition(".")
            this = os.path.join(folder, stem)
            if this != key and group:
                yield _found(path, key, group)
                group = {}
            key = this
            group[suffix.lower()] = data
    except _DAMAGE as error:
        reason = f"the archive stops or is damaged after {key!r} ({error}); copy it anew"
        raise FaultError(reason, "truncated") from error
    if group:
        yield _found(path, key, group)


def _found(path: Path, key: str, group: dict[str, Any]) -> Found:
    return Found(f"{path}, {key}", {KEY: key, **group})


def _is_safe(path: Path, name: str, is_file: bool, size: int, report: Report) -> bool:
    parts = PurePosixPath(name.replace("\\", "/"))
    is_picture = parts.suffix.lower() in SUFFIXES
    most = DEFAULT_LIMITS.max_bytes if is_picture else _MAX_TEXT_BYTES
    where = f"{path}, {name}"
    if parts.is_absolute() or ".." in parts.parts:
        report(Fault(where, "path_escape", "its name leaves the archive; pack it anew"))
    elif not is_file:
        report(Fault(where, "unsafe_member", "a link or device; pack the file itself"))
    elif size > most:
        report(Fault(where, "malformed", f"{size:,} bytes, over the limit of {most:,}"))
    else:
        return True
    return False


def _tar(path: Path, report: Report) -> Iterator[tuple[str, bytes]]:
    with open_bytes(path) as file:
        is_packed = isinstance(file, gzip.GzipFile)
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if _is_safe(path, member.name, member.isfile(), member.size, report):
                    stream = archive.extractfile(member)
                    yield member.name, stream.read() if stream is not None else b""
            end = archive.offset
        _check_end(file, end, is_packed)


def _check_end(file: BinaryIO, end: int, is_packed: bool) -> None:
    """`tarfile` takes a broken header, or none, for the end; the end is a block of zeros."""
    if is_packed:  # its checksum stands at its end
        while file.read(2**20):
            pass
        return
    file.seek(end)
    if file.read(512) != bytes(512):
        raise tarfile.ReadError(f"no end mark at byte {end:,}")


def _zip(path: Path, report: Report) -> Iterator[tuple[str, bytes]]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    with archive:
        for info in sorted(archive.infolist(), key=lambda each: each.filename):
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if not info.is_dir() and _is_safe(
                path, info.filename, not is_link, info.file_size, report
            ):
                yield info.filename, archive.read(info)
