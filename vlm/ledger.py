"""Captions on disk, one JSON line a file, so that a killed run can be taken up again.

The promise: however and whenever a run ends, a rerun of the same command leaves exactly
one row for every file. A row is one line, written whole and flushed; a last line that a
kill tore is cut off by the next run. Rows name model, prompt and length, and a ledger
holds one combination only. A file that has changed since gets a new row: the last row of
a path counts.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from vlm.captioning import (
    CaptionResult,
    caption_many,
    check_batch_size,
    expand_paths,
    file_facts,
    file_sha256,
)
from vlm.errors import ConfigError, MissingExtraError, RecordError

if TYPE_CHECKING:
    from vlm.assistant import Assistant

_START = b'{"path": '  # of every row; tells a torn row from somebody else's file
_FACTS = ("size", "mtime_ns", "sha256", "error")


@dataclass(frozen=True)
class Summary:
    """What a run did: captions and errors written, files that had a row already."""

    captioned: int
    failed: int
    skipped: int


@dataclass(frozen=True)
class _Known:
    """What a ledger knows of a file."""

    size: int | None
    mtime_ns: int | None
    sha256: bytes | None
    failed: bool


def caption_to_ledger(
    assistant: "Assistant",
    paths: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 16,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    retry_errors: bool = False,
    on_row: Callable[[CaptionResult], None] | None = None,
) -> Summary:
    """Caption files and folders into a JSONL ledger; files with a row are skipped.

    Args:
        assistant: does the work.
        paths: files and folders, as for `vlm.captioning.caption_many`.
        out: the ledger; made if absent, continued if present.
        batch_size: pictures that run together, and rows between two syncs to disk.
        prompt: replaces the model's own captioning question.
        max_new_tokens: the most tokens of a caption.
        retry_errors: try files again whose row is an error.
        on_row: called with each new row once it is written.

    Raises:
        ConfigError: another process writes this ledger, or it holds the captions of
            another model, prompt or length.
        RecordError: `out` is no ledger, or cannot be written.
    """
    check_batch_size(batch_size)
    run = {
        "model": assistant.name,
        "model_id": assistant.identity,
        "prompt": assistant.caption_prompt if prompt is None else prompt,
        "max_new_tokens": max_new_tokens,
    }
    counts = {"captioned": 0, "failed": 0, "skipped": 0}
    with Ledger(out, run) as ledger:

        def lacking() -> Iterator[str]:
            for path in expand_paths(paths):
                if ledger.has(path, retry_errors):
                    counts["skipped"] += 1
                else:
                    yield path

        results = caption_many(
            assistant,
            lacking(),
            batch_size=batch_size,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
        )
        for number, result in enumerate(results, 1):
            ledger.append(result)
            counts["captioned" if result.error is None else "failed"] += 1
            if number % batch_size == 0:
                ledger.sync()
            if on_row is not None:
                on_row(result)
    return Summary(**counts)


class Ledger:
    """A JSONL file of captions, held by one process; a context manager.

    Args:
        path: the file.
        run: what all rows have in common: model, model_id, prompt, max_new_tokens.

    Raises:
        ConfigError, RecordError: on entering; see `caption_to_ledger`.
    """

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any]) -> None:
        self.path = Path(path)
        self._run = run
        self._known: dict[str, _Known] = {}
        self._file: BinaryIO

    def __enter__(self) -> "Ledger":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            _lock(self._file, self.path)
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.sync()
        finally:
            with contextlib.suppress(OSError):  # it flushes once more what `sync` could not
                self._file.close()  # gives the lock back

    def has(self, path: str, retry_errors: bool = False) -> bool:
        """Whether there is a row for this very content; the file's time may have changed."""
        known = self._known.get(path)
        if known is None or (retry_errors and known.failed):
            return False
        size, mtime_ns = file_facts(path)
        if size != known.size or mtime_ns == known.mtime_ns:
            return size == known.size
        return known.sha256 is not None and file_sha256(path) == known.sha256.hex()

    def append(self, result: CaptionResult) -> None:
        """Write one row and flush it.

        Raises:
            RecordError: the disk is full or gone; finished rows are kept.
        """
        row = {**dataclasses.asdict(result), **self._run}
        try:
            line = json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # a file name that is no UTF-8
            line = json.dumps(row).encode("ascii")
        try:
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._remember(row)

    def sync(self) -> None:
        """Have the rows survive a power cut, as far as the disk keeps its word.

        Raises:
            RecordError: the disk is full or gone.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _read(self) -> None:
        """Take in all rows; cut off a torn last line."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                if not (line.startswith(_START) or _START.startswith(line)):
                    raise self._foreign(number)
                self._file.truncate(end)
                break
            row = self._row(line, number)
            self._check_run(row)
            try:
                self._remember(row)
            except (TypeError, ValueError) as error:
                raise self._foreign(number) from error
            end += len(line)

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise self._foreign(number) from error
        if not line.startswith(_START) or not {*_FACTS, *self._run} <= set(row):
            raise self._foreign(number)
        return dict(row)

    def _check_run(self, row: dict[str, Any]) -> None:
        for key in ("model_id", "prompt", "max_new_tokens"):
            if row[key] != self._run[key]:
                raise ConfigError(
                    f"{self.path} holds captions with {key} {row[key]!r} (model {row['model']}), "
                    f"not {self._run[key]!r}; give another ledger, or the same {key}"
                )

    def _remember(self, row: dict[str, Any]) -> None:
        digest = bytes.fromhex(row["sha256"]) if row["sha256"] else None
        failed = row["error"] is not None
        self._known[row["path"]] = _Known(row["size"], row["mtime_ns"], digest, failed)

    def _foreign(self, number: int) -> RecordError:
        return RecordError(
            f"{self.path}:{number} is no row of captions; give another file to write to"
        )

    def _unwritable(self, error: OSError) -> RecordError:
        reason = error.strerror or str(error)
        return RecordError(
            f"{self.path}: cannot be written ({reason}); make room or give another file, "
            "then run again: finished rows are kept"
        )


def _lock(file: BinaryIO, path: Path) -> None:
    """Hold the ledger for this process; the system gives it back even after a kill."""
    try:
        import fcntl
    except ImportError as error:
        raise MissingExtraError(
            "ledgers need file locks of a POSIX system; use WSL, or Assistant.caption_many"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"{path} is being written by another process; wait for it or give another file"
        ) from error
