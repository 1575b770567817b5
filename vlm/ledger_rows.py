"""Rows of a ledger: results to JSON lines and back, and a file that one process holds."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vlm.caption_prompts import Caption
from vlm.captioning import CaptionResult
from vlm.errors import ConfigError, MissingExtraError, RecordError

START = b'{"path": '  # of every row; tells a torn row from somebody else's file
_FACTS = ("path", "size", "mtime_ns", "sha256", "error")
_OPTIONAL = ("copy_of", "captions", "missing", "unwanted", "questions")


def name_key(name: str) -> bytes:
    """A short key of a picture's name, any bytes of a file name included."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def row_of(result: CaptionResult) -> dict[str, Any]:
    """A result as a row's own part; what is seldom set is left out where it is not."""
    row = dataclasses.asdict(result)
    for key in _OPTIONAL:
        if not row[key]:
            del row[key]
    return {"path": row.pop("path"), "status": result.status, **row}


def result_of(row: Mapping[str, Any]) -> CaptionResult:
    """A row as a result."""
    names = {each.name for each in dataclasses.fields(CaptionResult)}
    given = {key: value for key, value in row.items() if key in names}
    for key in ("missing", "unwanted"):
        given[key] = tuple(given.get(key, ()))
    captions = given.get("captions")
    if captions is not None:
        given["captions"] = {key: Caption(**value) for key, value in captions.items()}
    return CaptionResult(**given)


def encode_row(row: Mapping[str, Any]) -> bytes:
    """A row as a line."""
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a file name that is no UTF-8
        return json.dumps(row).encode("ascii") + b"\n"


def parse_row(line: bytes, path: Path, number: int, keys: Iterable[str] = ()) -> dict[str, Any]:
    """A line as a row.

    Raises:
        RecordError: it is none, with file and line.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise foreign(path, number) from error
    if not line.startswith(START) or not {*_FACTS, *keys} <= set(row):
        raise foreign(path, number)
    return dict(row)


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and content of each whole row of a ledger.

    Raises:
        RecordError: it cannot be read, or holds something else.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); check the path") from error
    with file:
        end = 0
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield end, parse_row(line, Path(path), number)
            end += len(line)


def read_line(descriptor: int, offset: int) -> bytes:
    """The line at an offset; moves no file position, so any thread may call it."""
    line, size = b"", 1 << 12
    while not line.endswith(b"\n"):
        block = os.pread(descriptor, size, offset + len(line))
        line += block[: block.find(b"\n") + 1] if b"\n" in block else block
        if not block:
            break
    return line


def foreign(path: Path, number: int) -> RecordError:
    """The error for a line that is no row."""
    return RecordError(f"{path}:{number} is no row of captions; give another file to write to")


def open_locked(path: Path, patience: float = 0.0) -> BinaryIO:
    """Open a file to append to and hold it; the system gives it back even after a kill.

    Raises:
        ConfigError: another process has held it for `patience` seconds.
        MissingExtraError: the system has no such locks.
        OSError: it cannot be opened.
    """
    try:
        import fcntl
    except ImportError as error:
        raise MissingExtraError(
            "ledgers need file locks of a POSIX system; use WSL, or Assistant.caption_many"
        ) from error
    deadline = time.monotonic() + patience
    while True:
        file = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()  # a merge has removed or replaced it between the two steps
        except OSError as error:
            file.close()
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"{path} is being written by another process; wait for it or give another file"
                ) from error
            time.sleep(0.05)
