"""Rows that a command passed over: listed in a file, or counted."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from vlm.errors import RecordError

if TYPE_CHECKING:
    from vlm.messages import Record

FAULTS = "faults.jsonl"


class FaultList:
    """Writes a line for each fault that a reader tells of.

    Attributes:
        num: told so far.
        path: of the list.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.num, self.path, self._file = 0, path, file

    def __call__(self, fault: Any) -> None:
        """Add a fault, a dataclass of `data_recipes.formats`."""
        self.num += 1
        print(json.dumps(asdict(fault)), file=self._file)

    def end(self) -> None:
        """Name the list and end the command with code 1, if anything is in it."""
        if self.num:
            print(self.path)
            raise typer.Exit(1)


class FaultCount:
    """Counts faults and keeps the first, for a command that only looks at data.

    Attributes:
        num: told so far.
    """

    def __init__(self) -> None:
        self.num = 0
        self._first = ""

    def __call__(self, fault: Any) -> None:
        """Count a fault, a dataclass of `data_recipes.formats`."""
        self.num += 1
        self._first = self._first or str(fault)

    def some(self, records: Iterable["Record"]) -> Iterator["Record"]:
        """The same records; RecordError with the first fault if there is not one."""
        empty = True
        for record in records:
            empty = False
            yield record
        if empty:
            told = f"{self.num:,} rows, the first: {self._first}" if self.num else "it is empty"
            raise RecordError(f"no record can be read: {told}")

    def end(self) -> None:
        """Tell of them on standard error and end the command with code 1, if there were any."""
        if self.num:
            rows = "1 row was" if self.num == 1 else f"{self.num:,} rows were"
            print(f"{rows} passed over, the first: {self._first}", file=sys.stderr)
            raise typer.Exit(1)


@contextmanager
def fault_list(folder: Path, wanted: bool) -> Iterator[FaultList | None]:
    """The list in a folder; None if it is not wanted, so that the first fault is an error."""
    if not wanted:
        yield None
        return
    path = folder / FAULTS
    with path.open("w", encoding="utf-8") as file:
        yield FaultList(path, file)
