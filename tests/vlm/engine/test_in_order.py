"""Arrivals and order, without a model: a desk that answers when it is told to."""

import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from vlm.engine.arrivals import ahead_of
from vlm.engine.batches import Batches
from vlm.engine.in_order import in_order
from vlm.errors import ContextLengthError, GenerationError

PATIENCE = 20.0


class Ask:
    """Stands for a request: so many steps, then its number, or an error."""

    def __init__(self, number: int, steps: int, error: Exception | None = None) -> None:
        self.number, self.steps, self.error = number, steps, error
        self.ended = self.abandoned = False

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.number

    def abandon(self) -> None:
        self.ended = self.abandoned = True


class Counter:
    """A desk of one token a step for all."""

    def __init__(self) -> None:
        self.running: list[Ask] = []
        self.most = self.steps = 0

    def submit(self, requests: Any) -> list[Ask]:
        for each in requests:
            if isinstance(each.error, ContextLengthError):
                raise each.error
        self.running += requests
        return list(requests)

    def step(self) -> None:
        self.steps += 1
        self.most = max(self.most, len(self.running))
        for each in self.running:
            each.steps -= 1
            each.ended = each.ended or each.steps <= 0
        self.running = [each for each in self.running if not each.ended]

    def optimize(self) -> None:
        """Nothing."""


class Slow(Counter):
    """Leaves other threads the time that a model would."""

    def step(self) -> None:
        time.sleep(0.001)
        super().step()


@dataclass
class Work:
    """An item with its requests."""

    number: int
    asks: list[Ask]


def split(work: Work) -> tuple[int, list[Ask]]:
    return work.number, work.asks


def works(number: int, seed: int) -> Iterator[Work]:
    chance = random.Random(seed)
    for n in range(number):
        error = chance.choice([None, None, GenerationError("x"), ContextLengthError("y")])
        asks = [
            Ask(n, chance.choice([1, 2, 40]), error) for _ in range(chance.choice([0, 1, 1, 3]))
        ]
        yield Work(n, asks)


@pytest.mark.parametrize("places", [1, 2, 5, 32])
@pytest.mark.parametrize("readers", [0, 3])
def test_each_item_comes_once_in_order_with_all_that_came_of_it(places: int, readers: int) -> None:
    desk = Counter()
    expected = list(works(300, places))

    def read(work: Work) -> Work:
        if work.number % 50 == 0:
            time.sleep(0.01)
        return work

    with ahead_of(works(300, places), places, read, readers) as arriving:
        found = list(in_order(desk, arriving, split, places))
    assert [number for number, _ in found] == list(range(300))
    for work, (number, outcomes) in zip(expected, found, strict=True):
        assert [str(each) for each in outcomes] == [
            str(number if ask.error is None else ask.error) for ask in work.asks
        ]
    assert 0 < desk.most <= 3 * places  # up to three requests an item


def test_what_has_ended_holds_no_pixels_while_it_waits_for_its_turn() -> None:
    alive: weakref.WeakSet[Ask] = weakref.WeakSet()

    def source() -> Iterator[Work]:
        for number in itertools.count():
            ask = Ask(number, 200 if number == 0 else 1)
            alive.add(ask)
            yield Work(number, [ask])

    taken = 0

    def split_counted(work: Work) -> tuple[int, list[Ask]]:
        nonlocal taken
        taken += 1
        return split(work)

    with ahead_of(source(), 4, lambda work: work) as arriving:
        found = in_order(Slow(), arriving, split_counted, 4)
        assert next(found)[0] == 0
        gc.collect()
        assert next(found)[0] == 1
        assert taken > 40
        assert len(alive) <= 4 + 4 + 4 + 2  # at the desk, next, ahead, in hand
        found.close()


def test_rows_are_abandoned_and_stepped_out_when_nobody_waits_any_more() -> None:
    desk = Counter()
    asks = [Ask(n, 1 if n == 0 else 1000) for n in range(4)]
    with ahead_of([Work(a.number, [a]) for a in asks], 4, lambda work: work) as arriving:
        found = in_order(desk, arriving, split, 4)
        assert next(found)[0] == 0
        running = list(desk.running)
        found.close()
    assert all(each.abandoned for each in running) and desk.running == []


def test_what_threads_read_keeps_its_order_and_an_error_its_place() -> None:
    slow = threading.Event()

    def read(number: int) -> int:
        if number == 0:
            slow.wait(PATIENCE)
        if number == 3:
            raise OSError("no third")
        if number == 2:
            slow.set()  # others are read while the first one is slow
        return number

    before = set(threading.enumerate())
    with ahead_of(range(10), 5, read, 4) as arriving:
        assert [arriving.take(1, wait=True) for _ in range(3)] == [[0], [1], [2]]
        assert not arriving.over and arriving.error is None
        assert arriving.take(1, wait=True) == []
        assert arriving.over and str(arriving.error) == "no third"
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("vlm-")]


def test_nothing_is_taken_before_there_is_room() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    with ahead_of(source(), 3, lambda number: number) as arriving:
        time.sleep(0.1)
        assert taken == [0, 1, 2]
        assert arriving.take(0, wait=True) == []
        assert arriving.take(2, wait=True) == [0, 1]
        time.sleep(0.1)
        assert taken == [0, 1, 2, 3, 4]


def test_where_a_batch_fails_each_runs_alone() -> None:
    batches: list[list[int]] = []

    def answer(asks: Any) -> list[Any]:
        batches.append([ask.number for ask in asks])
        for ask in asks:
            if ask.error is not None:
                raise ask.error
        return [ask.number for ask in asks]

    desk = Batches(answer)
    asks: list[Any] = [Ask(0, 1), Ask(1, 1, GenerationError("broken")), Ask(2, 1), Ask(3, 1)]
    tickets = desk.submit(asks)
    tickets[3].abandon()
    desk.step()
    desk.step()
    assert batches == [[0, 1, 2], [0], [1], [2]]
    assert [tickets[0].result(), tickets[2].result()] == [0, 2]
    with pytest.raises(GenerationError, match="broken"):
        tickets[1].result()
