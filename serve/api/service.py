"""One model behind the API: what all requests share, and the way of one of them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from starlette.requests import Request

from serve.api.conversation import Fetch, conversation
from serve.api.desk import Job, desk_of
from serve.api.intake import read_body
from serve.api.limits import Budget, Limits
from serve.api.metrics import Metrics
from serve.api.problems import ApiError, busy
from serve.api.schema import AnyMessage, ChatRequest, TextPart, parse_request, sampling_of
from vlm.engine.request import Request as Prompt

R = TypeVar("R")
_READERS = 4  # threads that decode pictures and tokenise
_CHARACTERS = 32  # more than a token has, on average over any text


@runtime_checkable
class ApiModel(Protocol):
    """What the API needs of `vlm.assistant.Assistant`."""

    engine: Any
    processor: Any
    built_in: bool

    @property
    def name(self) -> str:
        """A short name."""

    def prepare(self, messages: Any, **options: Any) -> Prompt:
        """Check and encode one conversation."""


@dataclass(eq=False)
class Order:
    """A request on its way.

    Attributes:
        asked: what was asked.
        jobs: its answers.
        news: set whenever one of them has grown or ended.
        arrived: by `time.monotonic`.
        held: bytes that count in the service's budget.
    """

    asked: ChatRequest
    arrived: float
    jobs: list[Job] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        for job in self.jobs:
            job.cancel()

    @property
    def ended(self) -> bool:
        """Whether all answers are there."""
        return all(job.ended for job in self.jobs)


class Service:
    """Takes requests and hands out answers; its methods run in one event loop.

    Args:
        model: answers.
        limits: on what clients may ask for.
        fetch: gets pictures from addresses; without one these are refused.

    Attributes:
        draining: whether new requests are refused because the server is about to end.
        under_way: requests that are not over.
    """

    def __init__(
        self, model: ApiModel, limits: Limits | None = None, fetch: Fetch | None = None
    ) -> None:
        self.model = model
        self.model_id = "built-in" if model.built_in else model.name
        self.limits = limits or Limits()
        self.draining = False
        self.started = int(time.time())
        self.desk = desk_of(model.engine)
        self._budget = Budget(self.limits.held_bytes)
        self._fetch = fetch
        self._readers = ThreadPoolExecutor(_READERS, "vlm-api")
        self._orders: set[Order] = set()
        self.under_way = 0
        self.metrics = Metrics(model.engine, lambda: self.under_way)

    @property
    def status(self) -> str:
        """``ok``, ``draining``, or ``failing`` while no answer comes through."""
        if self.draining:
            return "draining"
        return "ok" if self.desk.healthy else "failing"

    @property
    def busy(self) -> bool:
        """Whether anything is under way, answers to the page's visitors included."""
        scheduler = getattr(self.model.engine, "scheduler", ())
        return self.under_way > 0 or len(scheduler) > 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests under way, for as long as the block runs.

        Raises:
            ApiError: 503 while draining, 429 if there is none.
        """
        if self.draining:
            raise busy("the server is about to end", code="draining")
        if self.under_way >= self.limits.requests:
            raise busy(f"{self.limits.requests} requests are under way", 429, "queue_full")
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    async def order(self, request: Request) -> Order:
        """Read a request and order its answers; `leave` must follow.

        Raises:
            ApiError, VlmError: it cannot be answered.
            ClientDisconnect: the client went away.
        """
        arrived = time.monotonic()
        body = await read_body(request, self.limits, self._budget)
        held = len(body)
        try:
            asked = await self.in_thread(parse_request, body)
            del body
            order = Order(asked, arrived)
            prompts = await self.in_thread(self._prompts, asked)
            pictures = _num_bytes(prompts[0])
            if not self._budget.take(pictures):
                raise busy("too many pictures are waiting")
            held += pictures
            loop = asyncio.get_running_loop()
            order.jobs = await self.in_thread(
                self.desk.submit,
                prompts,
                lambda: loop.call_soon_threadsafe(order.news.set),
                bool(asked.stream),
            )
        except BaseException:
            self._budget.give(held)
            raise
        order.held = held
        self._orders.add(order)
        return order

    def leave(self, order: Order) -> None:
        """Forget an order; what of it still runs is cancelled."""
        order.cancel()
        self._budget.give(order.held)
        self._orders.discard(order)
        self.metrics.note(order.jobs, order.arrived)

    def refuse(self) -> None:
        """Take nothing new and cancel what is under way; may be called from any thread."""
        self.draining = True
        for order in list(self._orders):
            order.cancel()

    def close(self) -> None:
        """Let all threads end."""
        self.desk.close()
        self._readers.shutdown(wait=False)

    def _prompts(self, asked: ChatRequest) -> list[Prompt]:
        """What to ask the model, once for each choice."""
        number = self._check(asked)
        processor = self.model.processor
        draft_to = getattr(processor, "draft_to", None)
        messages = conversation(asked.messages, self.limits, draft_to, self._fetch)
        first = self.model.prepare(
            messages,
            # A conversation that goes on will probably go on: the next turn starts from here.
            keep=any(message.role == "assistant" for message in messages),
            timeout=self.limits.answer_seconds,
            **sampling_of(asked),
        )
        first = self.model.engine.ahead(first)
        seed = first.sampling.seed
        prompts = []
        for i in range(number):
            drawn = None if seed is None else (seed + i) % 2**63
            sampling = replace(first.sampling, seed=drawn)
            prompts.append(replace(first, sampling=sampling, stop=threading.Event()))
        return prompts

    def _check(self, asked: ChatRequest) -> int:
        """The number of choices of a request that is within limits."""
        if asked.model != self.model_id:
            raise ApiError(
                404,
                "model_not_found",
                f"there is no model {asked.model[:100]!r} here; use {self.model_id!r}",
                "model",
            )
        number = asked.n or 1
        if number > self.limits.num_choices:
            raise ApiError(422, "invalid_value", f"n is at most {self.limits.num_choices}", "n")
        context = self.model.processor.context_length
        for name in ("max_tokens", "max_completion_tokens"):
            if (getattr(asked, name) or 0) > context:
                text = f"{name} is {getattr(asked, name)}, but the model has {context} positions"
                raise ApiError(422, "invalid_value", text, name)
        length = sum(map(_num_characters, asked.messages))
        if length > _CHARACTERS * context:  # no need to tokenise it
            raise ApiError(
                422,
                "context_length_exceeded",
                f"the messages have {length:,} characters, which cannot fit the model's {context} "
                "positions; shorten the conversation",
                "messages",
            )
        return number

    async def in_thread(self, function: Callable[..., R], *args: Any) -> R:
        """Run what would hold up the event loop; few do at the same time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, function, *args)


def _num_bytes(prompt: Prompt) -> int:
    """Of the decoded pictures."""
    return sum(3 * image.pixels.width * image.pixels.height for image in prompt.prompt.images)


def _num_characters(message: AnyMessage) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part.text) for part in message.content if isinstance(part, TextPart))
