"""Things that threads make ready while the model runs: walked and read ahead, kept in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_LEAVE_SECONDS = 1.0


class Arrivals(Generic[T, R]):
    """The other end of an iterable that a thread is walking; see `ahead_of`."""

    def __init__(
        self, source: Iterable[T], size: int, read: Callable[[T], R], readers: int
    ) -> None:
        self._error: BaseException | None = None
        self._size = size
        self._read = read
        self._line: deque[Future[R]] = deque()
        self._ended = self._left = False
        self._news = threading.Condition()
        self._pool = ThreadPoolExecutor(readers, "vlm-read") if readers else None
        self._thread = threading.Thread(
            target=self._walk, args=(source,), name="vlm-arrivals", daemon=True
        )
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        with self._news:
            return self._ended and not self._line

    @property
    def error(self) -> BaseException | None:
        """What ended it, to be raised once what came before is done; None while it is not over."""
        return self._error if self.over else None

    def take(self, number: int, wait: bool) -> list[R]:
        """What is ready, in order, at most `number`.

        Args:
            number: none are taken for 0 or less.
            wait: for the first one, if there is none yet; empty only at the end then.
        """
        taken: list[R] = []
        with self._news:
            if wait and number > 0:
                self._news.wait_for(self._is_ready)
            while len(taken) < number and self._line and self._line[0].done():
                future = self._line.popleft()
                error = future.exception()
                if error is not None:
                    self._end(error)
                    self._line.clear()
                    break
                taken.append(future.result())
            self._news.notify_all()
        return taken

    def leave(self) -> None:
        """Take nothing more. The threads end, one that waits for its source at its next item."""
        with self._news:
            self._left = True
            self._news.notify_all()
        self._thread.join(_LEAVE_SECONDS)  # a source that blocks must not hold back Ctrl-C
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _is_ready(self) -> bool:
        return self._line[0].done() if self._line else self._ended

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._error = error
        self._ended = self._left = True

    def _walk(self, source: Iterable[T]) -> None:
        error: BaseException | None = None
        try:
            iterator = iter(source)
            while self._has_room():  # asked first: nothing is taken that nobody waits for
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                self._add(item)
        except BaseException as raised:
            error = raised
        with self._news:
            if not self._left:
                self._end(error)
            self._news.notify_all()

    def _has_room(self) -> bool:
        with self._news:
            self._news.wait_for(lambda: self._left or len(self._line) < self._size)
            return not self._left

    def _add(self, item: T) -> None:
        future: Future[R]
        if self._pool is None:
            future = Future()
            future.set_result(self._read(item))
        else:
            with self._news:
                if self._left:
                    return
                future = self._pool.submit(self._read, item)
        with self._news:
            self._line.append(future)
        future.add_done_callback(self._tell)

    def _tell(self, _: "Future[R]") -> None:
        with self._news:
            self._news.notify_all()


@contextmanager
def ahead_of(
    source: Iterable[T], size: int, read: Callable[[T], R], readers: int = 0
) -> Iterator[Arrivals[T, R]]:
    """Walk `source` in a thread, at most `size` items ahead; it is left behind on the way out.

    Args:
        source: what it raises ends it, after the items before.
        size: items that are read or being read.
        read: makes each item ready; what it raises counts as raised by the source.
        readers: threads that read; with none, the walking thread does.
    """
    arrivals = Arrivals(source, size, read, readers)
    try:
        yield arrivals
    finally:
        arrivals.leave()
