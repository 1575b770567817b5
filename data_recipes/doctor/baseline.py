"""How often the commonest answer is right: what a model reaches that never looks.

Questions are grouped by their form; a data set whose forms have one usual answer teaches
and measures language alone (Goyal et al. 2017, arXiv:1612.00837).
"""

import re
from collections import Counter
from dataclasses import dataclass

from vlm.messages import Record

_WORDS_OF_A_FORM = 3
_LONGEST_ANSWER = 60  # characters; a longer one is free text and has no commonest answer
_LOOKED_AT, _LONGEST_WORD = 200, 24  # characters
_MAX_PAIRS = 500_000
_WORD = re.compile(r"[^\W\d_]+|\d+")


@dataclass(frozen=True)
class Form:
    """Questions that begin alike: how many, their commonest answer and its share."""

    opening: str
    num: int
    answer: str
    share: float


class Baseline:
    """Counts short answers by the form of their question; memory is capped.

    Once `_MAX_PAIRS` pairs of form and answer are known, new pairs count as wrong guesses,
    so that `share` becomes a lower bound.
    """

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str]] = Counter()
        self._totals: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Count the short answers of a record."""
        question = ""
        for message in record.messages:
            if message.role == "user":
                question = message.text
            elif message.role == "assistant" and len(message.text) <= _LONGEST_ANSWER:
                self._count(form(question), message.text.strip().rstrip(".").lower())

    def _count(self, opening: str, answer: str) -> None:
        pair = (opening, answer)
        if pair in self._answers or len(self._answers) < _MAX_PAIRS:
            self._answers[pair] += 1
            self._totals[opening] += 1
        else:
            self._totals[opening if opening in self._totals else "(other)"] += 1

    def forms(self) -> list[Form]:
        """All forms, the most frequent first."""
        best: dict[str, tuple[int, str]] = {}
        for (opening, answer), num in self._answers.items():
            best[opening] = max(best.get(opening, (0, "")), (num, answer))
        return [
            Form(opening, num, best.get(opening, (0, ""))[1], best.get(opening, (0, ""))[0] / num)
            for opening, num in self._totals.most_common()
        ]

    def share(self) -> float | None:
        """Share of short answers that the commonest one of their form hits; None without any."""
        forms = self.forms()
        num = sum(each.num for each in forms)
        return sum(each.share * each.num for each in forms) / num if num else None


def form(question: str) -> str:
    """The first three words of a question, digits as one sign.

    >>> form("What color is the 2nd bus?")
    'what color is'
    """
    words = _WORD.findall(question[:_LOOKED_AT].lower())[:_WORDS_OF_A_FORM]
    return (
        " ".join("#" if word.isdigit() else word[:_LONGEST_WORD] for word in words) or "(no words)"
    )
