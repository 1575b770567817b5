"""Records whose pictures cannot be used: passed over by name, never replaced.

A loader worker finds them and sends word along with the batch; the process that trains
writes each into ``quarantine.jsonl`` once. A batch that lost all its records is computed on
another one with weight zero, so that no rank waits for a gradient.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from train.ranks import is_first_rank
from vlm.errors import ErrorLimitError, ImageError, VlmError
from vlm.images import load_image
from vlm.ledger_rows import encode_row
from vlm.messages import Record
from vlm.padding import IGNORE_INDEX
from vlm.record_files import picture_name

FILE = "quarantine.jsonl"
TOLD = "told"  # the key of a batch's `Told`
_ALWAYS, _SHARE = 10, 0.01  # bad records that a run passes over: so many and a share of all


@dataclass(frozen=True)
class BadRecord:
    """A record that is passed over: its id, the file at fault, and why."""

    id: str
    file: str
    code: str
    reason: str


@dataclass(frozen=True)
class Told:
    """What a batch says beside its tensors.

    Attributes:
        ids: of the records that were drawn.
        bad: those that were passed over.
        weightless: nothing was left; the batch's loss counts nothing.
    """

    ids: tuple[str, ...]
    bad: tuple[BadRecord, ...] = ()
    weightless: bool = False


class Quarantine:
    """A collator that passes over records with bad pictures.

    Args:
        collate: records to a batch; raises for records that it cannot take.
        data: a map-style data set; one of its records stands in for a batch that lost all.
    """

    def __init__(self, collate: Callable[[Sequence[Record]], dict[str, Any]], data: Any) -> None:
        self._collate = collate
        self._data = data

    def __call__(self, drawn: Sequence[Record | None]) -> dict[str, Any]:
        """The batch of the usable records, with its `Told` under ``told``.

        Args:
            drawn: records; None is left out, see `train.held_out.FilledUp`.

        Raises:
            VlmError: a record cannot be taken for another reason than its pictures.
        """
        records = [record for record in drawn if record is not None]
        if not records:
            return {**self._stand_in(), TOLD: Told((), weightless=True)}
        ids = tuple(record.id for record in records)
        try:
            return {**self._collate(records), TOLD: Told(ids)}
        except VlmError as error:
            if not _is_about_pictures(error):
                raise
        found = [self._fault(record) for record in records]
        good = [record for record, bad in zip(records, found, strict=True) if bad is None]
        told = Told(ids, tuple(bad for bad in found if bad is not None), not good)
        return {**(self._collate(good) if good else self._stand_in()), TOLD: told}

    def _fault(self, record: Record) -> BadRecord | None:
        try:
            self._collate([record])
        except VlmError as error:
            if not _is_about_pictures(error):
                raise
            for file in record.images:
                try:
                    load_image(file)
                except ImageError as found:
                    return BadRecord(record.id, picture_name(file), found.code, str(found))
            raise
        return None

    def _stand_in(self) -> dict[str, Any]:
        """A batch of the first usable record, with nothing to learn."""
        for index in range(min(len(self._data), allowed(len(self._data)) + 1)):
            record = self._data[index]
            if self._fault(record) is None:
                batch = self._collate([record])
                if "labels" in batch:
                    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
                return batch
        raise ErrorLimitError(
            "the pictures of all records tried so far are bad; check the paths in the data file"
        )


class QuarantineFile:
    """The bad records of a run, each once, in the order they were met.

    Args:
        path: of the file; what an earlier part of this run wrote is kept unless it was
            mended since.
        num_records: of the data.

    The first rank alone reads and writes it.
    """

    def __init__(self, path: Path, num_records: int) -> None:
        self._path = path
        self._limit = allowed(num_records)
        self._num_records = num_records
        before = path.read_bytes() if path.is_file() and is_first_rank() else b""
        self._known = {bad: None for bad in _parse(before) if _is_still_bad(bad)}
        kept = b"".join(map(_line, self._known))
        if kept != before:
            path.write_bytes(kept)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Sequence[BadRecord]) -> None:
        """Write down those that are new.

        Raises:
            ErrorLimitError: they are more than a run passes over.
        """
        new = [bad for bad in dict.fromkeys(found) if bad not in self._known]
        if not new:
            return
        self._known |= dict.fromkeys(new)
        with self._path.open("ab") as file:
            file.write(b"".join(map(_line, new)))
        if len(self) > self._limit:
            raise ErrorLimitError(
                f"{len(self)} of {self._num_records} records have bad pictures, a run passes over "
                f"{self._limit}; mend or remove those in {self._path}, then the same command goes "
                "on"
            )


def allowed(num_records: int) -> int:
    """How many bad records a run passes over."""
    return _ALWAYS + int(_SHARE * num_records)


def _is_about_pictures(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ImageError):
            return True
        error = error.__cause__
    return False


def _is_still_bad(bad: BadRecord) -> bool:
    try:
        load_image(bad.file)
    except ImageError:
        return True
    return False


def _line(bad: BadRecord) -> bytes:
    return encode_row(asdict(bad))


def _parse(lines: bytes) -> list[BadRecord]:
    """The whole lines; a kill may have cut off the last."""
    whole = [line for line in lines.splitlines(keepends=True) if line.endswith(b"\n")]
    return [BadRecord(**json.loads(line)) for line in whole]
