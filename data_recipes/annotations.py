"""The publisher's annotations: JSON in files and archives, and LLaVA's entries."""

import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_recipes.formats import Fault
from data_recipes.formats.conversations import convert, is_sharegpt
from data_recipes.formats.faults import FaultError
from data_recipes.formats.json_list import list_items
from data_recipes.formats.pictures import Pictures
from data_recipes.formats.row import Row
from vlm.errors import RecordError
from vlm.messages import Record

_DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    RecordError,
)


def load(folder: Path, file: str, member: str | None = None) -> Any:
    """The JSON of a file, or of a member of an archive; it is held in memory whole.

    Raises:
        RecordError: the file is truncated, or is no JSON.
    """
    with opened(folder, file, member) as stream:
        return json.load(stream)


def stream(folder: Path, file: str, member: str | None = None) -> Iterator[Any]:
    """The values of a list of JSON, one at a time.

    Raises:
        RecordError: as `load`; the values before were given.
    """
    with opened(folder, file, member) as data:
        yield from list_items(data)


@contextmanager
def opened(folder: Path, file: str, member: str | None = None) -> Iterator[BinaryIO]:
    """A file, or a member of a zip or tar file by its name, in whichever folder it lies.

    Raises:
        RecordError: also for damage that shows while it is read.
    """
    path = folder / file
    try:
        if member is None:
            with path.open("rb") as plain:
                yield plain
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(n for n in archive.namelist() if n.split("/")[-1] == member)
                with archive.open(name) as inside:
                    yield cast(BinaryIO, inside)
        else:
            with tarfile.open(path) as packed:
                found = next(m for m in packed if m.isfile() and m.name.split("/")[-1] == member)
                yield cast(BinaryIO, packed.extractfile(found))
    except StopIteration as error:
        raise RecordError(f"{path}: it has no {member}; fetch it again") from error
    except _DAMAGE as error:
        what = f"{path}{f', {member}' if member else ''}"
        reason = " ".join(str(error).split())
        raise RecordError(f"{what}: not the publisher's file ({reason}); fetch it again") from error


class _Names(Pictures):
    """Pictures are called as the publisher calls them; who builds finds and checks them."""

    def bind(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise FaultError(f"a picture is {value!r}; give a path", "malformed")
        return value


def llava(folder: Path, file: str, source: str, repeats: bool = True) -> Iterator[Record | Fault]:
    """The entries of a LLaVA file in their order.

    Args:
        folder: that has it.
        file: a list of ``id``, ``image`` and ``conversations``.
        source: of the records.
        repeats: ids repeat in the file, so that the entry's index is put behind.
    """
    names = _Names(folder)
    for i, raw in enumerate(stream(folder, file)):
        try:
            if not isinstance(raw, dict) or not is_sharegpt(raw):
                raise FaultError("no entry with conversations", "unknown_shape")
            record = convert(Row(raw, file, names))
        except FaultError as error:
            yield Fault(f"{file}, entry {i + 1}", error.code, str(error))
            continue
        yield replace(record, id=f"{record.id}-{i}" if repeats else record.id, source=source)
