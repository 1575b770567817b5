"""Records read where they lie: by index, in memory that does not grow with the data."""

import bisect
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlm.errors import RecordError
from vlm.messages import Record, build_record, parse_record

_KEPT_GROUPS = 2  # row groups of a Parquet file in memory, the one in use among them


class _File(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


class RecordFiles:
    """The records of JSONL and Parquet files, one file after the other.

    Of JSONL the position of every line is kept (8 bytes a record), of Parquet the first
    row of every row group and the last two row groups that were read: small row groups, as
    `data_recipes.formats.write_parquet` makes them, are what keeps random access quick.

    Args:
        paths: files of `vlm.messages.Record`; ``.parquet`` ones by their name.

    Raises:
        RecordError: a file is missing, cannot be read or holds no record.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._files: list[_File] = []
        self._ends: list[int] = []
        self._fingerprint: str | None = None
        for path in self._paths:
            if not path.is_file():
                raise RecordError(
                    f"no data file {path}; build one with "
                    "`vlm data build scenes --num 1000 --seed 0 --out DIR`"
                )
            file = _Parquet(path) if path.suffix.lower() == ".parquet" else _Lines(path)
            if not len(file):
                raise RecordError(f"{path} holds no record")
            self._files.append(file)
            self._ends.append(len(self) + len(file))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        at = bisect.bisect_right(self._ends, index)
        return self._files[at][index - (self._ends[at - 1] if at else 0)]

    def fingerprint(self) -> str:
        """sha256 over names and contents of the files as they are when it is first asked for."""
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class _Lines:
    """A JSONL file by the positions of its lines."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._starts = array("q")
        position = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._starts.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        start = self._starts[index]
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        where = f"{self._path}, byte {start}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: not UTF-8 text") from error
        return parse_record(text, self._path.parent, where)


class _Parquet:
    """A Parquet file by its row groups; opened anew for each, so that processes share nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._metadata: Any = None  # kept: parsing it takes longer than reading a row group
        self._metadata = self._open().metadata
        self._ends = array("q")
        for number in range(self._metadata.num_row_groups):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self._metadata.row_group(number).num_rows)
        self._groups: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        (raw,) = self._group(number).slice(row, 1).to_pylist()
        return row_record(raw, self._path.parent, f"{self._path}, row {index}")

    def _group(self, number: int) -> Any:
        import pyarrow as pa

        group = self._groups.pop(number, None)
        if group is None:
            try:
                group = self._open().read_row_group(number)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(self._path, error) from error
        self._groups[number] = group  # the newest stands last
        while len(self._groups) > _KEPT_GROUPS:
            del self._groups[next(iter(self._groups))]
        return group

    def _open(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self._path, metadata=self._metadata)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._path, error) from error


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(f"{path} is no readable Parquet file ({error}); write it anew")


def row_record(raw: Mapping[str, Any], folder: Path | None, where: str) -> Record:
    """A row of a Parquet file to a record.

    Columns: ``id``, ``images`` (structs of bytes and path, as the `Image` feature of
    `datasets` has them; a path counts where the bytes are absent), ``messages`` and ``meta``
    (nested, or JSON as text), ``source``, ``license``. What is null is absent.

    Raises:
        RecordError: beginning with `where`.
    """
    row = {key: value for key, value in raw.items() if value is not None}
    try:
        for key in ("messages", "meta"):
            if isinstance(row.get(key), str):
                row[key] = json.loads(row[key])
    except ValueError as error:
        raise RecordError(f"{where}: {key} is not JSON ({error})") from error
    if isinstance(row.get("images"), list):
        row["images"] = [_picture(image) for image in row["images"]]
    if "messages" in row:
        row["messages"] = without_nulls(row["messages"])
    return build_record(row, folder, where)


def _picture(value: Any) -> Any:
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def without_nulls(value: Any) -> Any:
    """Nested lists and mappings without the keys whose value is null, which a table adds."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def picture_name(source: str | bytes) -> str:
    """How a message calls a picture of a record: its path, or the hash of its bytes."""
    if isinstance(source, str):
        return source
    return f"sha256:{hashlib.sha256(source).hexdigest()}"
