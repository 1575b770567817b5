"""Requests that are made in a thread while the model runs earlier ones."""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Arrivals(Generic[T]):
    """The other end of an iterable that a thread is walking; see `ahead_of`.

    Attributes:
        over: nothing more will come.
        error: what the iterable raised, to be raised once what came before it is done.
    """

    def __init__(self, source: Iterable[T], size: int) -> None:
        self.over = False
        self._taken: list[T] = []
        self.error: BaseException | None = None
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(size)
        self._left = threading.Event()
        self._thread = threading.Thread(
            target=self._walk, args=(source,), name="vlm-arrivals", daemon=True
        )
        self._thread.start()

    def take(self, number: int, wait: bool) -> list[T]:
        """The next `number` items, fewer at the end; none if they are not there yet.

        Args:
            number: a few together cost the model less than one at a time.
            wait: until they are there.
        """
        while len(self._taken) < number and not self.over:
            try:
                kind, value = self._queue.get(block=wait)
            except queue.Empty:
                return []
            if kind == "item":
                self._taken.append(value)  # type: ignore[arg-type]
            else:
                self.over = True
                self.error = value if isinstance(value, BaseException) else None
        taken, self._taken = self._taken, []
        return taken

    def leave(self) -> None:
        """Take nothing more; the thread ends at its next item."""
        self._left.set()
        self._thread.join()

    def _walk(self, source: Iterable[T]) -> None:
        try:
            for item in source:
                if not self._put("item", item):
                    return
        except BaseException as error:
            self._put("error", error)
        else:
            self._put("end", None)

    def _put(self, kind: str, value: T | BaseException | None) -> bool:
        while not self._left.is_set():
            try:
                self._queue.put((kind, value), timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


@contextmanager
def ahead_of(source: Iterable[T], size: int) -> Iterator[Arrivals[T]]:
    """Walk `source` in a thread, at most `size` items ahead; it is left behind on the way out."""
    arrivals = Arrivals(source, size)
    try:
        yield arrivals
    finally:
        arrivals.leave()
