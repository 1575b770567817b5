"""Answers that go round in circles: the same tokens over and over until the limit.

Greedy answers do that most (Holtzman et al. 2020, arXiv:1904.09751, section 4), and never
come out of it. An answer is in a loop when its last tokens are one sequence repeated at
least four times, 48 tokens or more in all. So what ends in a word said ten times, or a
list whose numbers count on, is none.
"""

from collections import deque

MIN_REPEATS = 4
MIN_TOKENS = 48
MAX_PERIOD = 128


class LoopDetector:
    """Watches the tokens of one answer; exact for sequences of up to 128 tokens.

    A token costs as much as it has equals among the 128 before it: a few in a text.
    """

    def __init__(self) -> None:
        self._count = 0
        self._places: dict[int, deque[int]] = {}  # of each token, the last MAX_PERIOD back
        self._runs: dict[int, int] = {}  # period: how many last tokens equal the one before it

    def add(self, token: int) -> bool:
        """Take one token; return whether the answer is in a loop now."""
        now = self._count
        self._count += 1
        places = self._places.setdefault(token, deque())
        while places and now - places[0] > MAX_PERIOD:
            places.popleft()
        before = self._runs
        self._runs = {now - place: before.get(now - place, 0) + 1 for place in places}
        places.append(now)
        return any(
            run + period >= max(MIN_TOKENS, MIN_REPEATS * period)
            for period, run in self._runs.items()
        )
