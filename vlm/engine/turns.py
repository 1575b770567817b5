"""A lock that is handed over in the order of asking."""

import threading
from collections import deque
from types import TracebackType


class TurnLock:
    """First come, first served mutual exclusion; a context manager, not re-entrant.

    Python's own lock may go back to the thread that just released it: of two streams
    that each lock once per token, one could wait until the other has ended.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._state:
            if not self._held:
                self._held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            mine.acquire()  # released by the holder before us, who hands the lock over
        except BaseException:  # an interrupt while waiting must not swallow the turn
            self._give_up(mine)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._state:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._waiting.popleft().release()
        else:
            self._held = False

    def _give_up(self, mine: threading.Lock) -> None:
        with self._state:
            if mine in self._waiting:
                self._waiting.remove(mine)
            else:  # our turn had come already
                self._hand_over()
