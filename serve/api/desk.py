"""Answers that are under way, brought forward by a thread and read by the event loop.

With the package's own engine one thread takes every step, and all answers advance together.
Any other model runs by its own `generate`, one answer at a time, each in a thread.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from serve.api.problems import where
from vlm.engine.generate import GenerateEngine
from vlm.engine.request import Completion, Request, Row
from vlm.engine.runner import Engine
from vlm.engine.task import Task
from vlm.errors import VlmError

log = logging.getLogger(__name__)
Tell = Callable[[], None]


class Job:
    """One answer under way.

    Args:
        request: its `stop` is an event of its own.
        tell: called in another thread: at the end, and whenever there is news if `each_token`.
        each_token: see `tell`.

    Attributes:
        row: what is there so far; None before the model has begun.
        ended: whether nothing more will come.
        error: what ended it, if it is no answer.
        first: when its first token came, by `time.monotonic`.
        last: when it ended.
    """

    def __init__(self, request: Request, tell: Tell, each_token: bool) -> None:
        assert request.stop is not None
        self.request = request
        self.row: Row | None = None
        self.ended = False
        self.error: Exception | None = None
        self.first: float | None = None
        self.last: float | None = None
        self._tell = tell
        self._each_token = each_token

    def cancel(self) -> None:
        """Let the answer end before the next token."""
        assert self.request.stop is not None
        self.request.stop.set()

    def advance(self) -> None:
        """Note that there are more tokens."""
        if self.first is None:
            self.first = time.monotonic()
        if self._each_token:
            self._call()

    def end(self, error: Exception | None = None) -> None:
        """Note that nothing more will come."""
        self.last = time.monotonic()
        if self.first is None and self.row is not None and self.row.ids:
            self.first = self.last
        self.error, self.ended = error, True
        self._call()

    def _call(self) -> None:
        try:
            self._tell()
        except RuntimeError:  # the event loop is closed: nobody reads any more
            self.cancel()

    def result(self) -> Completion:
        """The completion of an ended job, or its error raised."""
        if self.error is not None:
            raise self.error
        assert self.row is not None
        return self.row.completion()


class Desk(Protocol):
    """Where answers are ordered."""

    @property
    def healthy(self) -> bool:
        """Whether the last answer was one, or failed for a reason of its own."""

    def submit(self, requests: Sequence[Request], tell: Tell, each_token: bool) -> list[Job]:
        """Order answers, all or none; errors as those of the engine's `submit`."""

    def close(self) -> None:
        """Take no more; the thread ends after the answers under way."""


def desk_of(engine: Engine | GenerateEngine) -> Desk:
    """The desk for an engine."""
    return StepDesk(engine) if isinstance(engine, Engine) else ThreadDesk(engine)


class StepDesk:
    """A thread that takes steps for as long as any answer is under way."""

    def __init__(self, engine: Engine) -> None:
        self.healthy = True
        self._engine = engine
        self._jobs: list[tuple[Job, Task]] = []
        self._closed = False
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="vlm-desk", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], tell: Tell, each_token: bool) -> list[Job]:
        """Order answers; they begin with the next step."""
        tasks = self._engine.submit(requests)
        jobs = [Job(request, tell, each_token) for request in requests]
        with self._work:
            for job, task in zip(jobs, tasks, strict=True):
                job.row = task
                self._jobs.append((job, task))
            self._work.notify()
        return jobs

    def close(self) -> None:
        """Let the thread end."""
        with self._work:
            self._closed = True
            self._work.notify()

    def _run(self) -> None:
        told: dict[int, int] = {}
        while True:
            with self._work:
                self._work.wait_for(lambda: self._jobs or self._closed)
                jobs = list(self._jobs)
            if not jobs:
                return
            try:
                if len(jobs) > 1:
                    self._engine.optimize()
                self._engine.step()
            except Exception as error:  # a step ends its own answers; this is worse
                log.error("a step failed with %s", where(error))
                self.healthy = False
                for _, task in jobs:
                    task.error = task.error or error
            self._report(jobs, told)

    def _report(self, jobs: list[tuple[Job, Task]], told: dict[int, int]) -> None:
        ended = []
        for job, task in jobs:
            if task.ended:
                ended.append(job)
                told.pop(id(job), None)
                self.healthy = task.error is None or is_own(task.error)
                job.end(task.error)
            elif len(task.ids) > told.get(id(job), 0):
                told[id(job)] = len(task.ids)
                job.advance()
        if ended:
            with self._work:
                self._jobs = [pair for pair in self._jobs if pair[0] not in ended]


class ThreadDesk:
    """A thread for every answer; the engine lets them run one after the other."""

    def __init__(self, engine: GenerateEngine) -> None:
        self.healthy = True
        self._engine = engine

    def submit(self, requests: Sequence[Request], tell: Tell, each_token: bool) -> list[Job]:
        """Order answers."""
        jobs = [Job(request, tell, each_token) for request in requests]
        streams = [self._engine.stream(request) for request in requests]
        for job, stream in zip(jobs, streams, strict=True):
            threading.Thread(
                target=self._run, args=(job, stream), name="vlm-answer", daemon=True
            ).start()
        return jobs

    def close(self) -> None:
        """Nothing to do: each thread ends with its answer."""

    def _run(self, job: Job, stream: Iterator[Row]) -> None:
        try:
            for row in stream:
                job.row = row
                if row.ids:
                    job.advance()
        except Exception as error:
            self.healthy = is_own(error)
            job.end(error)
        else:
            self.healthy = True
            if job.row is not None:  # the folder may have set a limit of its own
                job.row.finish_reason = job.row.finish_reason or "length"
            job.end()


def is_own(error: Exception) -> bool:
    """Whether an error says something of its request, and not of the server."""
    return isinstance(error, VlmError)
