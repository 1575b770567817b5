"""The scheduler's rules, on jobs that only count."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.engine.scheduler import Scheduler
from vlm.errors import QueueFullError


@dataclass(eq=False)
class Count:
    """Ends after `steps` steps."""

    name: int
    num_tokens: int = 1
    steps: int = 1
    reach: int = 1

    @property
    def ended(self) -> bool:
        return self.steps <= 0


def nothing(source: int, target: int) -> None:
    pass


def test_first_come_first_served_up_to_the_places() -> None:
    scheduler = Scheduler[Count](max_running=3)
    jobs = [Count(i) for i in range(5)]
    scheduler.submit(jobs)
    assert scheduler.admit() == jobs[:3]
    assert scheduler.admit() == []
    jobs[1].steps = 0
    assert scheduler.retire(nothing) == [jobs[1]]
    assert scheduler.admit() == [jobs[3]]
    assert list(scheduler.jobs()) == [jobs[0], jobs[2], jobs[3], jobs[4]]


def test_a_step_takes_a_bounded_number_of_tokens_but_always_one_job() -> None:
    scheduler = Scheduler[Count](max_running=8, max_step_tokens=10)
    jobs = [Count(0, 25), Count(1, 4), Count(2, 6), Count(3, 1)]
    scheduler.submit(jobs)
    assert scheduler.admit() == jobs[:1]
    assert scheduler.admit() == jobs[1:3]
    assert scheduler.admit() == jobs[3:]


def test_positions_of_all_that_run_are_bounded_but_one_job_always_runs() -> None:
    scheduler = Scheduler[Count](max_positions=10)
    jobs = [Count(0, reach=30), Count(1, reach=6), Count(2, reach=5), Count(3, reach=4)]
    scheduler.submit(jobs)
    assert scheduler.admit() == jobs[:1]
    assert scheduler.admit() == []
    jobs[0].steps = 0
    scheduler.retire(nothing)
    assert scheduler.admit() == jobs[1:2]
    jobs[1].steps = 0
    scheduler.retire(nothing)
    assert scheduler.admit() == jobs[2:]


def test_nearly_full_it_waits_for_a_quarter_of_the_places() -> None:
    scheduler = Scheduler[Count](max_running=8)
    jobs = [Count(i) for i in range(20)]
    scheduler.submit(jobs)
    scheduler.admit()
    jobs[0].steps = 0
    scheduler.retire(nothing)
    assert scheduler.admit() == []
    jobs[1].steps = 0
    scheduler.retire(nothing)
    assert scheduler.admit() == jobs[8:10]


def test_a_late_job_joins_at_once_where_there_is_room() -> None:
    scheduler = Scheduler[Count](max_running=8)
    scheduler.submit([Count(0), Count(1)])
    scheduler.admit()
    late = Count(2)
    scheduler.submit([late])
    assert scheduler.admit() == [late]


def test_a_full_queue_refuses_all_or_takes_all() -> None:
    scheduler = Scheduler[Count](max_waiting=3)
    scheduler.submit([Count(0), Count(1)])
    with pytest.raises(QueueFullError, match="2 requests are waiting, of 3 at most"):
        scheduler.submit([Count(2), Count(3)])
    assert len(scheduler.waiting) == 2


def test_jobs_that_ended_while_they_waited_take_no_place() -> None:
    scheduler = Scheduler[Count](max_running=2)
    jobs = [Count(0, steps=0), Count(1), Count(2)]
    scheduler.submit(jobs)
    assert scheduler.admit() == jobs[1:]


def test_what_is_put_back_is_first_again() -> None:
    scheduler = Scheduler[Count](max_running=4)
    jobs = [Count(i) for i in range(6)]
    scheduler.submit(jobs)
    new = scheduler.admit()
    scheduler.put_back(new[2:])
    assert scheduler.running == jobs[:2]
    assert list(scheduler.waiting) == jobs[2:]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 6)), max_size=40),
    st.integers(1, 6),
    st.integers(1, 20),
)
def test_every_job_runs_its_steps_in_a_place_of_its_own(
    plan: list[tuple[int, int]], places: int, tokens: int
) -> None:
    """The moves that it tells keep a model of the tensors in step with the jobs."""
    scheduler = Scheduler[Count](max_running=places, max_step_tokens=tokens)
    jobs = [Count(i, size, steps) for i, (size, steps) in enumerate(plan)]
    wanted = {job.name: job.steps for job in jobs}
    scheduler.submit(jobs)
    held: list[int] = [-1] * places
    done = dict.fromkeys(wanted, 0)
    started: list[int] = []

    def move(source: int, target: int) -> None:
        held[target] = held[source]

    while len(scheduler):
        before = len(scheduler.running)
        for place, job in enumerate(scheduler.admit(), before):
            held[place] = job.name
            started.append(job.name)
        for place, job in enumerate(scheduler.running):
            assert held[place] == job.name
            done[job.name] += 1
            job.steps -= 1
        scheduler.retire(move)
        assert len(scheduler.running) <= places
    assert started == sorted(started)
    assert done == wanted
