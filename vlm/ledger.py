"""Captions on disk, one JSON line a picture, so that a killed run can be taken up again.

The promise: however and whenever a run ends, a rerun of the same command leaves exactly
one row for every picture. A row is one line, written whole and flushed; a last line that a
kill tore is cut off by the next run. Rows name model, prompt and options, and a ledger
holds one combination only. A picture that has changed since gets a new row: the last row
of a path counts. What is kept in memory is about 330 bytes a row.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from vlm.caption_items import Item, file_item
from vlm.caption_prompts import CaptionPrompts
from vlm.captioning import CaptionResult, expand_paths, file_facts, file_sha256
from vlm.errors import ConfigError, RecordError
from vlm.ledger_rows import (
    START,
    encode_row,
    foreign,
    name_key,
    open_locked,
    parse_row,
    read_line,
    result_of,
    row_of,
)

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.caption_export import Exported

_KNOWN = struct.Struct("<qqB32s")  # size and time, -1 for None; flags; sha256
_FAILED, _HASHED = 1, 2
_OFFSET_BITS = 48


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        captioned: pictures that got a caption.
        failed: pictures that got a row with an error.
        skipped: pictures that had a row already.
        copied: of the captioned ones, those with the caption of a picture of the same bytes.
        complete: False for a rank whose run is merged by another one, or later.
        exported: text files that were written, if any were asked for.
    """

    captioned: int
    failed: int
    skipped: int
    copied: int = 0
    complete: bool = True
    exported: "Exported | None" = None


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
    """Caption picture files and folders; `vlm.caption_images` with the plainest options.

    Raises:
        ConfigError, RecordError, MessageError, ContextLengthError: as `caption_images`.
    """
    from vlm.caption_job import caption_images
    from vlm.caption_prompts import literal

    return caption_images(
        map(file_item, expand_paths(paths)),
        out,
        model=assistant,
        batch_size=batch_size,
        prompt=None if prompt is None else literal(prompt),
        max_new_tokens=max_new_tokens,
        retry_errors=retry_errors,
        ranks=(0, 1),
        on_result=on_row,
    )


class Ledger:
    """A JSONL file of captions, held by one process; a context manager.

    Args:
        path: the file.
        run: what all rows have in common: model, model_id, prompt, max_new_tokens, options.
        prompts: with them, `find` knows earlier captions.
        before: other ledgers of the same run, whose rows count too; read only.
        patience: seconds to wait for another process that holds it.

    Raises:
        ConfigError: on entering: another process writes it, or it is another run's.
        RecordError: on entering: it is no ledger, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run: Mapping[str, Any],
        prompts: CaptionPrompts | None = None,
        before: Sequence[str | os.PathLike[str]] = (),
        patience: float = 0.0,
    ) -> None:
        self.path = Path(path)
        self._patience = patience
        self._run = dict(run)
        self._prompts = prompts
        self._before = [Path(each) for each in before if Path(each) != self.path]
        self._known: dict[bytes, bytes] = {}
        self._captions: dict[bytes, int] = {}  # where a caption of the same bytes stands
        self._files: list[BinaryIO] = []
        self._end = 0

    def __enter__(self) -> "Ledger":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._files = [open_locked(self.path, self._patience)]
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            for path in self._before:
                if path.exists():
                    self._files.append(open(path, "rb"))
            for place in reversed(range(len(self._files))):
                self._read(place)
        except BaseException:
            self._close()
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
            self._close()

    def _close(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # it flushes once more what `sync` could not
                file.close()  # gives the lock back

    @property
    def is_empty(self) -> bool:
        """Whether it has no row of its own; those of `before` do not count."""
        return self._end == 0

    def has(self, path: str, retry_errors: bool = False) -> bool:
        """Whether there is a row for this very content; the file's time may have changed."""
        return self.has_item(Item(path, path), retry_errors)

    def has_item(self, item: Item, retry_errors: bool = False) -> bool:
        """The same for a picture of any source."""
        found = self._known.get(name_key(item.name))
        if found is None:
            return False
        size, mtime_ns, flags, digest = _KNOWN.unpack(found)
        if retry_errors and flags & _FAILED:
            return False
        if item.path is None:
            if not isinstance(item.data, bytes):  # none, or pixels, which have no file's hash
                return True
            return not flags & _HASHED or hashlib.sha256(item.data).digest() == digest
        now = [-1 if fact is None else fact for fact in file_facts(item.path)]
        if now[0] != size or now[1] == mtime_ns:
            return bool(now[0] == size)
        return bool(flags & _HASHED) and file_sha256(item.path) == digest.hex()

    def find(self, same: bytes) -> CaptionResult | None:
        """A captioned picture by `CaptionPrompts.same`; may be called from any thread."""
        place = self._captions.get(same)
        if place is None:
            return None
        file = self._files[place >> _OFFSET_BITS]
        row = json.loads(read_line(file.fileno(), place & ((1 << _OFFSET_BITS) - 1)))
        return result_of(row)

    def append(self, result: CaptionResult, index: int | None = None) -> None:
        """Write one row and flush it; `index` is its place in the input, for a merge.

        Raises:
            RecordError: the disk is full or gone; finished rows are kept.
        """
        row = {**row_of(result), **self._run}
        if index is not None:
            row["index"] = index
        line = encode_row(row)
        try:
            self._files[0].write(line)
            self._files[0].flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self._remember(row, self._end)
        self._end += len(line)

    def sync(self) -> None:
        """Have the rows survive a power cut, as far as the disk keeps its word.

        Raises:
            RecordError: the disk is full or gone.
        """
        try:
            self._files[0].flush()
            os.fsync(self._files[0].fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _read(self, place: int) -> None:
        """Take in all rows; cut off a torn last line."""
        file, path = self._files[place], [self.path, *self._before][place]
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not (line.startswith(START) or START.startswith(line)):
                    raise foreign(path, number)
                if place == 0:
                    file.truncate(end)
                break
            row = parse_row(line, path, number, self._run)
            self._check_run(row, path)
            try:
                self._remember(row, place << _OFFSET_BITS | end)
            except (AttributeError, TypeError, ValueError, struct.error) as error:
                raise foreign(path, number) from error
            end += len(line)
        if place == 0:
            self._end = end

    def _check_run(self, row: Mapping[str, Any], path: Path) -> None:
        for key in ("model_id", "prompt", "max_new_tokens", "options"):
            old, new = row.get(key), self._run.get(key)
            if old == new:
                continue
            if isinstance(old, dict) and isinstance(new, dict) and key == "options":
                key = next(k for k in (*old, *new) if old.get(k) != new.get(k))
                old, new = old.get(key), new.get(key)
            raise ConfigError(
                f"{path} holds captions with {key} {old!r} (model {row['model']}), "
                f"not {new!r}; give another ledger, or the same {key}"
            )

    def _remember(self, row: Mapping[str, Any], place: int) -> None:
        digest = bytes.fromhex(row["sha256"]) if row["sha256"] else None
        flags = _FAILED * (row["error"] is not None) | _HASHED * (digest is not None)
        size, mtime_ns = (-1 if row[key] is None else row[key] for key in ("size", "mtime_ns"))
        self._known[name_key(row["path"])] = _KNOWN.pack(size, mtime_ns, flags, digest or b"")
        if self._prompts is not None and digest is not None and not flags & _FAILED:
            same = self._prompts.same(row["sha256"], row.get("questions") or {})
            self._captions.setdefault(same, place)

    def _unwritable(self, error: OSError) -> RecordError:
        reason = error.strerror or str(error)
        return RecordError(
            f"{self.path}: cannot be written ({reason}); make room or give another file, "
            "then run again: finished rows are kept"
        )
