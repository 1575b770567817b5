"""What a run knows of its records before it starts: lengths, and all that is wrong.

Every record is read and tokenised once, and no picture is opened: a visual token is counted
by the config. Wrong records are told now and not after hours. What is too long is refused,
dropped or split by whole turns, as the recipe says, and listed.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from train.dataset import RecordDataset
from vlm.errors import RecordError, VlmError
from vlm.messages import ImagePart, Message, Record
from vlm.processor import Processor

_TOLD = 5  # wrong records that the error names
Sample = tuple[int, int, int, int, int]  # the numbers of `_FIELDS`
_FIELDS = ("record", "first_turn", "last_turn", "length", "picture")


@dataclass(frozen=True)
class Survey:
    """The samples of a run: numpy arrays of one number a sample.

    Attributes:
        record: index of its record in the data set.
        first_turn: of the record's turns (a question and its answer) that it has.
        last_turn: one past its last turn.
        length: tokens, visual tokens included.
        picture: a number that stands for its first picture; 0 without one.
        num_pictures: different first pictures.
        too_long: lines of JSON on the records that did not fit, and what became of them.
    """

    record: np.ndarray
    first_turn: np.ndarray
    last_turn: np.ndarray
    length: np.ndarray
    picture: np.ndarray
    too_long: tuple[str, ...] = ()

    @property
    def num_pictures(self) -> int:
        """How many different pictures come first in a sample."""
        return int(np.count_nonzero(np.unique(self.picture)))


@dataclass(frozen=True)
class Limits:
    """How long a sample may be, and what becomes of a longer record."""

    max_length: int
    over_long: str


class Samples(Dataset[Record]):
    """The samples that a survey found, as records."""

    def __init__(self, records: RecordDataset, survey: Survey) -> None:
        self.records, self.survey = records, survey

    def __len__(self) -> int:
        return len(self.survey.record)

    def __getitem__(self, index: int) -> Record:
        record = self.records[int(self.survey.record[index])]
        first, last = int(self.survey.first_turn[index]), int(self.survey.last_turn[index])
        return part_of(record, first, last)

    def fingerprint(self) -> str:
        """Of the records' files."""
        return self.records.fingerprint()


def part_of(record: Record, first: int, last: int) -> Record:
    """The turns [first, last) of a record, with its system text and the pictures so far."""
    system = [m for m in record.messages if m.role == "system"]
    turns = record.messages[len(system) :]
    if first == 0 and 2 * last >= len(turns):
        return record
    earlier = tuple(ImagePart(i) for m in turns[: 2 * first] for i in m.images)
    question = turns[2 * first]
    opening = Message("user", (*earlier, *question.content))
    messages = (*system, opening, *turns[2 * first + 1 : 2 * last])
    images = tuple(str(image) for message in messages for image in message.images)
    return Record(f"{record.id}#{first}-{last}", images, messages, record.source, record.license)


def survey(
    records: RecordDataset,
    processor: Processor,
    limits: Limits,
    *,
    cache: Path | None = None,
    num_workers: int = 0,
) -> Survey:
    """Read all records.

    Args:
        records: to be read.
        processor: of the model.
        limits: of a sample's length.
        cache: file that keeps the result for the same records, tokenizer and limits.
        num_workers: processes that read.

    Raises:
        RecordError: records that are malformed, have no answer, or are too long where that
            is an error; the first few are named.
    """
    key = _key(records, processor, limits)
    known = _read(cache, key)
    if known is not None:
        return known
    looks = _Looks(records, processor, limits)
    loader: Any = DataLoader(looks, batch_size=64, num_workers=num_workers, collate_fn=list)
    found: list[Sample] = []
    wrong: list[str] = []
    too_long: list[str] = []
    for batch in track(loader, "reading records", transient=True, disable=len(looks) < 1000):
        for samples, line, error in batch:
            found += samples
            too_long += [line] if line else []
            wrong += [error] if error else []
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise RecordError("; ".join(wrong[:_TOLD]) + more)
    if not found:
        raise RecordError("no record is short enough; raise batches.max_length")
    arrays = dict(zip(_FIELDS, np.array(found, dtype=np.int64).T, strict=True))
    result = Survey(**arrays, too_long=tuple(too_long))
    if cache is not None:
        with cache.open("wb") as file:
            np.savez_compressed(file, key=np.array(key), too_long=np.array(too_long), **arrays)
    return result


class _Looks(Dataset[tuple[list[Sample], str, str]]):
    """For each record: its samples, a line if it was too long, and an error if it is wrong."""

    def __init__(self, records: RecordDataset, processor: Processor, limits: Limits) -> None:
        self._records, self._processor, self._limits = records, processor, limits

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[list[Sample], str, str]:
        try:
            record = self._records[index]
            length = self._length(record)
        except RecordError as error:
            return [], "", str(error)
        except VlmError as error:  # of the template, which does not know the record
            return [], "", f"record {record.id}: {error}"
        picture = _number(record.images[0]) if record.images else 0
        turns = sum(message.role == "assistant" for message in record.messages)
        most = self._limits.max_length
        if length <= most:
            return [(index, 0, turns, length, picture)], "", ""
        facts: dict[str, Any] = {"id": record.id, "tokens": length, "most": most}
        if self._limits.over_long == "error":
            size = self._processor.num_visual_tokens
            return (
                [],
                "",
                f"record {record.id}: {len(record.images)} pictures x {size} visual tokens + "
                f"{length - len(record.images) * size} text tokens = {length} positions, of "
                f"{most} at most; shorten it, or say batches.over_long=drop or split",
            )
        pieces = list(self._pieces(record, turns)) if self._limits.over_long == "split" else []
        samples: list[Sample] = [
            (index, first, last, tokens, picture) for first, last, tokens in pieces
        ]
        facts["parts"] = [[first, last] for first, last, _ in pieces]
        facts["turns_dropped"] = turns - sum(last - first for first, last, _ in pieces)
        return samples, json.dumps(facts), ""

    def _length(self, record: Record) -> int:
        ids, mask = self._processor.encode_ids(record.messages)
        if not any(mask):
            raise RecordError(f"record {record.id} has no answer to learn from; remove it")
        return len(ids)

    def _pieces(self, record: Record, turns: int) -> Iterator[tuple[int, int, int]]:
        """As many whole turns at a time as fit; a turn that fits nowhere is left out."""
        first = 0
        while first < turns:
            last, tokens = first, 0
            while last < turns:
                longer = self._length(part_of(record, first, last + 1))
                if longer > self._limits.max_length:
                    break
                last, tokens = last + 1, longer
            if last > first:
                yield first, last, tokens
            first = max(last, first + 1)


def _number(source: str | bytes) -> int:
    name = source if isinstance(source, bytes) else source.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=7).digest()
    return int.from_bytes(digest, "big") + 1


def _key(records: RecordDataset, processor: Processor, limits: Limits) -> str:
    digest = hashlib.sha256(records.fingerprint().encode())
    digest.update(processor.tokenizer.backend_tokenizer.to_str().encode())
    told: Sequence[object] = (processor.chat_template, processor.num_visual_tokens, limits)
    digest.update(repr(told).encode())
    return digest.hexdigest()


def _read(cache: Path | None, key: str) -> Survey | None:
    if cache is None:
        return None
    try:
        with np.load(cache) as file:
            if str(file["key"]) != key:
                return None
            columns = {name: file[name] for name in _FIELDS}
            return Survey(**columns, too_long=tuple(file["too_long"].tolist()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
