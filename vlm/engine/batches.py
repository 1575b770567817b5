"""A desk at an engine that answers whole batches, each to its end."""

from collections.abc import Callable, Sequence

from vlm.engine.request import Completion, Request
from vlm.errors import ContextLengthError, GenerationError


class Ticket:
    """A request that somebody waits for."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.outcome: Completion | Exception | None = None
        self.abandoned = False

    @property
    def ended(self) -> bool:
        """Whether its result is there, or nobody waits for it."""
        return self.abandoned or self.outcome is not None

    def result(self) -> Completion:
        """The completion, or the error raised."""
        assert self.outcome is not None, "the request has not run"
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def abandon(self) -> None:
        """Do not run it."""
        self.abandoned = True


class Batches:
    """What was submitted since the last step runs as one batch in the next.

    Args:
        answer: a completion for each request, or ContextLengthError or GenerationError for
            all of them.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], list[Completion]]) -> None:
        self._answer = answer
        self._tickets: list[Ticket] = []

    def submit(self, requests: Sequence[Request]) -> list[Ticket]:
        """Put requests into the next batch."""
        tickets = [Ticket(request) for request in requests]
        self._tickets += tickets
        return tickets

    def step(self) -> None:
        """Answer all that were submitted; where a batch fails, each runs alone."""
        tickets, self._tickets = [each for each in self._tickets if not each.ended], []
        if tickets:
            self._run(tickets)

    def optimize(self) -> None:
        """Nothing to do."""

    def _run(self, tickets: list[Ticket]) -> None:
        try:
            answers = self._answer([each.request for each in tickets])
        except (ContextLengthError, GenerationError) as error:
            if len(tickets) == 1:
                tickets[0].outcome = error
                return
            for ticket in tickets:  # one must not take the others with it
                self._run([ticket])
            return
        for ticket, answer in zip(tickets, answers, strict=True):
            ticket.outcome = answer
