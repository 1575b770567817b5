"""Any number of requests through an engine: few in memory, results in their order.

A picture that ends makes room for the next one at once, across what would be batches.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from vlm.engine.arrivals import Arrivals, ahead_of
from vlm.errors import ContextLengthError

if TYPE_CHECKING:
    from vlm.engine.request import Completion, Request

R = TypeVar("R")
K = TypeVar("K")
_PATIENCE = 4  # steps that a few wait for others to start with, which costs the model less
_LONGEST = 64  # times the places: what has ended and waits for one before it, without pictures


class Handle(Protocol):
    """A request that somebody waits for."""

    @property
    def ended(self) -> bool:
        """Whether its result is there."""

    def result(self) -> "Completion":
        """The completion, or the error raised."""

    def abandon(self) -> None:
        """End it: nobody waits for it any more."""


class Desk(Protocol):
    """An engine as one job sees it."""

    def submit(self, requests: "Sequence[Request]") -> Sequence[Handle]:
        """Put requests into the queue, all or none; ContextLengthError if one is too long."""

    def step(self) -> Any:
        """Bring what was submitted forward."""

    def optimize(self) -> None:
        """Get ready for more than one request."""


class Desks(Protocol):
    """Anything with desks."""

    def desk(self, places: int) -> AbstractContextManager[Desk]:
        """A desk for a job of which `places` items run together."""


def answer_all(engine: Desks, requests: "Iterable[Request]", places: int) -> "Iterator[Completion]":
    """One completion a request, in their order; the first error is raised in its turn.

    Requests are taken in a thread while earlier ones run, so that whatever makes them
    (reading files, decoding pictures) costs no time at the model.

    Args:
        engine: does the work.
        requests: at most `places` are taken ahead of those at the model.
        places: requests that run together.

    Raises:
        Exception: a request's error, or what `requests` raises, once all before are answered.
    """
    with (
        ahead_of(requests, places, lambda request: request) as arriving,
        engine.desk(places) as desk,
        closing(in_order(desk, arriving, lambda each: (None, (each,)), places)) as made,
    ):
        for _, (outcome,) in made:
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome


class _Entry(Generic[K]):
    """One item on its way; once it has ended, it holds nothing but its outcomes."""

    def __init__(self, kept: K, requests: "Sequence[Request]") -> None:
        self.kept = kept
        self.requests = requests
        self.handles: list[Handle | Exception] = []
        self.outcomes: list[Completion | Exception] | None = None if requests else []

    def submit(self, desk: Desk) -> None:
        requests, self.requests = self.requests, ()
        for request in requests:
            try:
                self.handles += desk.submit([request])
            except ContextLengthError as error:
                self.handles.append(error)

    def has_ended(self) -> bool:
        if self.handles and all(map(_is_done, self.handles)):
            self.outcomes = [_outcome(each) for each in self.handles]
            self.handles = []  # and with them pixels
        return self.outcomes is not None


def in_order(
    desk: Desk,
    arriving: Arrivals[Any, R],
    admit: "Callable[[R], tuple[K, Sequence[Request]]]",
    places: int,
) -> "Generator[tuple[K, list[Completion | Exception]]]":
    """What came of each item, in their order, as soon as those before it are done.

    No item waits for others to arrive; one without requests waits for none behind it.

    Args:
        desk: does the work.
        arriving: items as they become ready.
        admit: what to keep of an item, and its requests, which run together; called in
            order, from the thread of the caller.
        places: items that run together.

    Yields:
        What is kept of an item, and a completion or an error for each of its requests.

    Raises:
        Exception: what ended `arriving`, once all items before are yielded.
    """
    few = places // 4 or 1
    line: deque[_Entry[K]] = deque()
    waiting: deque[_Entry[K]] = deque()
    running: list[_Entry[K]] = []
    waited = 0
    optimized = False
    try:
        while line or not arriving.over:
            running = [entry for entry in running if not entry.has_ended()]
            free = places - len(running)
            number = min(max(few, free) - len(waiting), _LONGEST * places - len(line))
            for item in arriving.take(number, wait=not line):
                line.append(_Entry(*admit(item)))
                if line[-1].requests:
                    waiting.append(line[-1])
            together = len(waiting) >= few or not running or arriving.over
            if waiting and free >= min(few, len(waiting)) and (together or waited >= _PATIENCE):
                waited = 0
                for _ in range(_round(min(free, len(waiting)))):
                    waiting[0].submit(desk)
                    running.append(waiting.popleft())
            while line and line[0].has_ended():
                entry = line.popleft()
                yield entry.kept, entry.outcomes or []
            if not optimized and len(running) > 1:
                desk.optimize()
                optimized = True
            if running:
                desk.step()
                waited += bool(waiting)
        if arriving.error is not None:
            raise arriving.error
    finally:
        left = [each for entry in line for each in entry.handles if not _is_done(each)]
        for each in left:
            each.abandon()  # type: ignore[union-attr]
        if left:
            desk.step()  # gives back what they held


def _round(number: int) -> int:
    """To a power of two, down: a CPU's kernels are made and kept for each number of rows."""
    return int(1 << (number.bit_length() - 1))


def _is_done(handle: Handle | Exception) -> bool:
    return isinstance(handle, Exception) or handle.ended


def _outcome(handle: Handle | Exception) -> "Completion | Exception":
    if isinstance(handle, Exception):
        return handle
    try:
        return handle.result()
    except Exception as error:  # the job decides what it is worth
        return error
