"""Who runs next: admission, queue, deadlines. Plain Python; nothing here knows tensors.

A job waits in a queue, runs in a place, and ends. Places are numbered without gaps, so
that the tensors of all running jobs lie side by side: when a job ends, the last one moves
into its place. Jobs are packed token by token, so their lengths need no sorting.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from vlm.errors import QueueFullError


class Job(Protocol):
    """What the scheduler must know of a job."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute before its first new one."""

    @property
    def reach(self) -> int:
        """The most positions that it may come to take."""

    @property
    def ended(self) -> bool:
        """Whether it needs no more steps."""


J = TypeVar("J", bound=Job)


class Scheduler(Generic[J]):
    """First come, first served, up to a number of places and of tokens a step.

    Args:
        max_running: places.
        max_step_tokens: prompt tokens admitted in one step; a longer prompt comes alone.
        max_waiting: jobs in the queue; more are refused.
        max_positions: of all running jobs together; a job that has more runs alone.
    """

    def __init__(
        self,
        max_running: int = 32,
        max_step_tokens: int = 8192,
        max_waiting: int = 10_000,
        max_positions: int = 2**62,
    ) -> None:
        assert max_running > 0 and max_step_tokens > 0
        self.max_positions = max_positions
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.max_waiting = max_waiting
        self.waiting: deque[J] = deque()
        self.running: list[J] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, jobs: list[J]) -> None:
        """Put jobs into the queue, all of them or none.

        Raises:
            QueueFullError: they do not fit.
        """
        if len(self.waiting) + len(jobs) > self.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting, of {self.max_waiting} at most; "
                "try again later"
            )
        self.waiting.extend(jobs)

    def admit(self) -> list[J]:
        """Jobs that start in this step; they take the next places, in order.

        A few prompts together cost less than one at a time: while many jobs run, a quarter
        of the places must be free before the next ones start.
        """
        if any(job.ended for job in self.waiting):  # cancelled while they waited
            self.waiting = deque(job for job in self.waiting if not job.ended)
        started: list[J] = []
        free = self.max_running - len(self.running)
        if self.running and free < min(len(self.waiting), -(-self.max_running // 4)):
            return started
        budget = self.max_step_tokens
        room = self.max_positions - sum(job.reach for job in self.running)
        while self.waiting and len(self.running) < self.max_running:
            job = self.waiting[0]
            if (started and job.num_tokens > budget) or (self.running and job.reach > room):
                break
            budget -= job.num_tokens
            room -= job.reach
            self.running.append(self.waiting.popleft())
            started.append(job)
        return started

    def put_back(self, jobs: list[J]) -> None:
        """Undo the admission of the last jobs; they are first in the queue again."""
        assert jobs == self.running[len(self.running) - len(jobs) :]
        del self.running[len(self.running) - len(jobs) :]
        self.waiting.extendleft(reversed(jobs))

    def retire(self, move: Callable[[int, int], None]) -> list[J]:
        """Take ended jobs out; ``move(a, b)`` is called when the job in place a goes to b."""
        gone: list[J] = []
        place = 0
        while place < len(self.running):
            if not self.running[place].ended:
                place += 1
                continue
            gone.append(self.running[place])
            last = self.running.pop()
            if place < len(self.running):
                self.running[place] = last
                move(len(self.running), place)
        return gone

    def jobs(self) -> Iterator[J]:
        """All jobs, running ones first."""
        yield from self.running
        yield from self.waiting
