"""Answers against references: exact match after normalising, per kind, with intervals."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_YES_NO = frozenset(("yes", "no"))
_FINAL = ".,;:!? "
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Question:
    """A question on one picture with its reference answer.

    Args:
        record: id of the record that it is from.
        image: path or bytes of the record's picture.
        text: the question.
        answer: the reference.
        kind: the group that it is counted in.
    """

    record: str
    image: str | bytes
    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Score:
    """Accuracy of one kind of question.

    Attributes:
        kind: the group, ``"overall"`` for all.
        n: questions.
        correct: right answers.
        majority: answers that would be right if each question got the commonest
            reference answer of its kind.
        yes: answers whose verdict is yes, where every reference is yes or no; else None.
    """

    kind: str
    n: int
    correct: int
    majority: int
    yes: int | None = None

    @property
    def accuracy(self) -> float:
        """Right answers over questions."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(self.correct, self.n)

    @property
    def yes_ratio(self) -> float | None:
        """Share of answers that say yes; 0.5 is unbiased on balanced questions."""
        return None if self.yes is None else self.yes / self.n

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "kind": self.kind,
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "majority_accuracy": self.majority / self.n,
            "majority_interval": list(wilson(self.majority, self.n)),
            "yes_ratio": self.yes_ratio,
        }


@dataclass(frozen=True)
class Report:
    """The result of one evaluation.

    Attributes:
        model: the assistant's name.
        control: ``"shuffled pictures"``, ``"blank picture"``, or None for the real thing.
        kinds: scores in alphabetical order.
        overall: all questions together.
        questions: what was asked.
        answers: what came back, in the same order.
    """

    model: str
    control: str | None
    kinds: tuple[Score, ...]
    overall: Score
    questions: tuple[Question, ...]
    answers: tuple[str, ...]

    def as_dict(self, *, with_answers: bool = False) -> dict[str, Any]:
        """The report for JSON; `with_answers` adds every question with its answer."""
        result: dict[str, Any] = {
            "model": self.model,
            "control": self.control,
            "overall": self.overall.as_dict(),
            "kinds": [kind.as_dict() for kind in self.kinds],
        }
        if with_answers:
            pairs = zip(self.questions, self.answers, strict=True)
            result["answers"] = [
                {**asdict(q), "given": given, "correct": is_correct(given, q.answer)}
                for q, given in pairs
            ]
        return result

    def to_json(self, *, with_answers: bool = False) -> str:
        """`as_dict` as indented JSON text."""
        return json.dumps(self.as_dict(with_answers=with_answers), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """The table as plain text, as wide as it needs to be."""
        from rich.console import Console

        console = Console(width=200, file=io.StringIO())
        with console.capture() as captured:
            console.print(self.table())
        return captured.get().rstrip("\n")

    def table(self) -> "Table":
        """The report for a terminal, with the majority baseline beside each accuracy."""
        return compare([self])


def score(
    questions: Sequence[Question],
    answers: Sequence[str],
    *,
    model: str = "",
    control: str | None = None,
) -> Report:
    """Count right answers; `questions` must not be empty.

    Raises:
        ValueError: as many answers as questions are needed.
    """
    pairs = list(zip(questions, answers, strict=True))
    by_kind: dict[str, list[tuple[Question, str]]] = {}
    for question, answer in pairs:
        by_kind.setdefault(question.kind, []).append((question, answer))
    kinds = tuple(_score_kind(kind, by_kind[kind]) for kind in sorted(by_kind))
    correct = sum(kind.correct for kind in kinds)
    overall = Score("overall", len(pairs), correct, sum(kind.majority for kind in kinds))
    return Report(model, control, kinds, overall, tuple(questions), tuple(answers))


def is_correct(given: str, reference: str) -> bool:
    """Exact match of normalised texts; for a yes/no reference the verdict decides."""
    wanted = normalise(reference)
    if wanted in _YES_NO:
        return verdict(given) == wanted
    return normalise(given) == wanted


def verdict(text: str) -> str | None:
    """The yes or no of an answer: its first word, else its last; None if neither is one.

    ``"yes, there is a dog"`` and ``"the dog is top left, the cat bottom left: yes"`` say yes.
    """
    words = _WORD.findall(text.lower())
    return next((word for word in (*words[:1], *words[-1:]) if word in _YES_NO), None)


def normalise(text: str) -> str:
    """Lower-case, without the articles a, an, the, final punctuation and double spaces.

    An article that is all there is stays, or an answer ``"A"`` would equal an empty one.
    """
    whole = " ".join(text.lower().split()).rstrip(_FINAL)
    return " ".join(_ARTICLES.sub(" ", whole).split()).rstrip(_FINAL) or whole


def wilson(correct: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22:209-212).

    ``(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``; stays within [0, 1] and
    is sound for small n and extreme p, where the usual p +- z sqrt(p(1-p)/n) is not.

    Raises:
        ValueError: unless 0 <= correct <= n and n > 0.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"{correct} of {n} is no proportion")
    p, square = correct / n, z * z / n
    centre = p + square / 2
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def compare(reports: Iterable[Report]) -> "Table":
    """Reports side by side: kinds down; accuracies with 95 % intervals across."""
    from rich.table import Table

    runs = list(reports)
    table = Table(title=", ".join(sorted({run.model for run in runs})))
    table.add_column("kind")
    table.add_column("n", justify="right")
    for run in runs:
        table.add_column(run.control or "accuracy", justify="right")
    table.add_column("majority answer", justify="right")
    table.add_column("yes-ratio", justify="right")
    columns: list[Mapping[str, Score]] = [_by_name(run) for run in runs]
    for name, first in columns[0].items():
        if name == "overall":
            table.add_section()
        scores = [column[name] for column in columns]
        ratios = [f"{s.yes_ratio:.2f}" for s in scores if s.yes_ratio is not None]
        table.add_row(
            name,
            str(first.n),
            *(percent(s.correct, s.n) for s in scores),
            percent(first.majority, first.n),
            " / ".join(ratios),
        )
    return table


def _score_kind(kind: str, pairs: Sequence[tuple[Question, str]]) -> Score:
    references = [normalise(question.answer) for question, _ in pairs]
    yes = None
    if set(references) <= _YES_NO:
        yes = sum(verdict(given) == "yes" for _, given in pairs)
    correct = sum(is_correct(given, question.answer) for question, given in pairs)
    return Score(kind, len(pairs), correct, Counter(references).most_common(1)[0][1], yes)


def _by_name(report: Report) -> dict[str, Score]:
    return {score.kind: score for score in (*report.kinds, report.overall)}


def percent(correct: int, n: int) -> str:
    """An accuracy with its 95 % interval: ``"50.0 % [15.0, 85.0]"``."""
    low, high = wilson(correct, n)
    return f"{100 * correct / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
