"""The lock: one at a time, in the order of asking."""

import threading
import time

import pytest

from vlm.engine.turns import TurnLock

WAIT = 10  # seconds before a test calls itself stuck


def waiting(lock: TurnLock, number: int) -> None:
    """Return once `number` threads stand in line."""
    end = time.monotonic() + WAIT
    while len(lock._waiting) < number:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_turns_come_in_the_order_of_asking() -> None:
    lock = TurnLock()
    order: list[int] = []

    def work(number: int) -> None:
        with lock:
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            waiting(lock, number + 1)
    for thread in threads:
        thread.join(WAIT)
    assert order == list(range(8))


def test_a_busy_thread_cannot_keep_the_turn_to_itself() -> None:
    """Two loops that lock once a round advance in step."""
    lock = TurnLock()
    log: list[str] = []

    def loop(name: str) -> None:
        for _ in range(50):
            with lock:
                log.append(name)
                time.sleep(0.0005)

    threads = [threading.Thread(target=loop, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    both = log[log.index("b") :][:60]
    assert 20 <= both.count("a") <= 40


def test_only_one_at_a_time() -> None:
    lock = TurnLock()
    inside = 0
    most = 0

    def loop() -> None:
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert most == 1


def test_an_error_inside_gives_the_turn_on() -> None:
    lock = TurnLock()
    with pytest.raises(RuntimeError), lock:
        raise RuntimeError
    done = threading.Event()

    def work() -> None:
        with lock:
            done.set()

    threading.Thread(target=work).start()
    assert done.wait(WAIT)
