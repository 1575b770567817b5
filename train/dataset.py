"""Records as a map-style data set whose memory does not grow with the pictures."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from vlm.errors import RecordError
from vlm.messages import Record, parse_record


class RecordDataset(Dataset[Record]):
    """The records of JSONL files, read line by line when they are asked for.

    Only the position of every line is kept in memory (8 bytes a record).

    Args:
        paths: JSONL files of `vlm.messages.Record`, one after the other.

    Raises:
        RecordError: a file is missing or holds no record.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._files = array("l")
        self._starts = array("q")
        for number, path in enumerate(self._paths):
            if not path.is_file():
                raise RecordError(
                    f"no data file {path}; build one with "
                    "`vlm data build scenes --num 1000 --seed 0 --out DIR`"
                )
            before = len(self._starts)
            self._index(number, path)
            if len(self._starts) == before:
                raise RecordError(f"{path} holds no record")

    def _index(self, number: int, path: Path) -> None:
        position = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    self._files.append(number)
                    self._starts.append(position)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[self._files[index]].absolute()
        with path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        where = f"{path}, byte {self._starts[index]}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: not UTF-8 text") from error
        return parse_record(text, path.parent, where)

    def fingerprint(self) -> str:
        """sha256 over names and contents of the files, for the run's manifest."""
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()
