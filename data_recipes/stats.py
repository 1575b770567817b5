"""What data holds: counts, lengths, sources, licences and the usual answers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_recipes.tokens import TokenCounter, encode
from vlm.messages import Record

_MOST_DIFFERENT = 500_000  # answers, sources or licences that are counted apart
_LONGEST_ANSWER = 60  # characters; a longer one is free text


class Spread:
    """Whole numbers, of which each value is counted: exact, and small as lengths are."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        """Count a value."""
        self._counts[value] += 1

    def __len__(self) -> int:
        return self._counts.total()

    @property
    def sum(self) -> int:
        """Of all values."""
        return sum(value * number for value, number in self._counts.items())

    def quantile(self, share: float) -> int:
        """The least value that at least this share of all does not exceed; 0 without any."""
        wanted, seen = share * len(self), 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                return value
        return 0

    def summary(self) -> dict[str, float]:
        """Sum, mean, least, median, 95th percentile and most."""
        return {
            "sum": self.sum,
            "mean": round(self.sum / len(self), 2) if len(self) else 0.0,
            "min": self.quantile(0.0),
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": self.quantile(1.0),
        }


class Names:
    """Names and how often each came; new ones beyond `_MOST_DIFFERENT` are counted as others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.others = 0

    def add(self, name: str) -> None:
        """Count a name."""
        if name in self.counts or len(self.counts) < _MOST_DIFFERENT:
            self.counts[name] += 1
        else:
            self.others += 1

    @property
    def total(self) -> int:
        """Of all, others included."""
        return self.counts.total() + self.others

    def summary(self, most: int | None = None) -> dict[str, Any]:
        """The commonest with their numbers, how many names differ, and the uncounted others."""
        return {
            "total": self.total,
            "different": len(self.counts),
            "others": self.others,
            "commonest": dict(self.counts.most_common(most)),
        }


@dataclass
class Stats:
    """Counts over records; memory does not grow with their number.

    Attributes:
        records, with_pictures, without_answers: how many.
        per_record: turns (questions), pictures, words; with a processor also tokens (visual
            ones included) and learnt tokens.
        per_turn: words of a question and of an answer; words are what blanks part.
        visual_tokens, too_long: with a processor: in all records, and records of more tokens
            than the model has positions.
        answers: those of at most `_LONGEST_ANSWER` characters, in lower case without the last
            full stop.
        long_answers: how many others there are.
        sources, licenses: of records; ``(none)`` without one.
        has_tokens: whether a processor counted.
    """

    records: int = 0
    with_pictures: int = 0
    without_answers: int = 0
    per_record: dict[str, Spread] = field(default_factory=dict)
    per_turn: dict[str, Spread] = field(default_factory=dict)
    visual_tokens: int = 0
    too_long: int = 0
    answers: Names = field(default_factory=Names)
    long_answers: int = 0
    sources: Names = field(default_factory=Names)
    licenses: Names = field(default_factory=Names)
    has_tokens: bool = False

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON has it; of answers the thousand commonest."""
        found: dict[str, Any] = {
            "records": self.records,
            "with_pictures": self.with_pictures,
            "without_pictures": self.records - self.with_pictures,
            "without_answers": self.without_answers,
            "per_record": {name: each.summary() for name, each in self.per_record.items()},
            "per_turn": {name: each.summary() for name, each in self.per_turn.items()},
            "short_answers": self.answers.summary(1000),
            "long_answers": self.long_answers,
            "sources": self.sources.summary(),
            "licenses": self.licenses.summary(),
        }
        if self.has_tokens:
            found |= {"visual_tokens": self.visual_tokens, "too_long": self.too_long}
        return found


def stats(records: Iterable[Record], processor: TokenCounter | None = None) -> Stats:
    """Count what records hold.

    Args:
        records: in one pass.
        processor: of a model, to count tokens; no picture is opened.

    Raises:
        RecordError: the model's template does not take a record's turns.
    """
    found = Stats(has_tokens=processor is not None)
    found.per_record = {name: Spread() for name in ("turns", "pictures", "words")}
    found.per_turn = {name: Spread() for name in ("question words", "answer words")}
    if processor is not None:
        found.per_record |= {name: Spread() for name in ("tokens", "learnt tokens")}
    for record in records:
        found.records += 1
        found.with_pictures += bool(record.images)
        found.sources.add(record.source or "(none)")
        found.licenses.add(record.license or "(none)")
        found.per_record["pictures"].add(len(record.images))
        _count_turns(found, record)
        if processor is not None:
            _count_tokens(found, record, processor)
    return found


def _count_turns(found: Stats, record: Record) -> None:
    turns = words = answers = 0
    for message in record.messages:
        text = message.text
        number = len(text.split())
        words += number
        if message.role == "user":
            turns += 1
            found.per_turn["question words"].add(number)
        elif message.role == "assistant":
            answers += 1
            found.per_turn["answer words"].add(number)
            if len(text) <= _LONGEST_ANSWER:
                found.answers.add(text.strip().rstrip(".").lower())
            else:
                found.long_answers += 1
    found.per_record["turns"].add(turns)
    found.per_record["words"].add(words)
    found.without_answers += not answers


def _count_tokens(found: Stats, record: Record, processor: TokenCounter) -> None:
    ids, learnt = encode(processor, record)
    found.per_record["tokens"].add(len(ids))
    found.per_record["learnt tokens"].add(sum(learnt))
    found.visual_tokens += len(record.images) * processor.num_visual_tokens if ids else 0
    found.too_long += len(ids) > processor.context_length
