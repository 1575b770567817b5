"""Answers by a model's own `generate`, for architectures that `vlm.model` does not compose.

One hook inside the generation loop does what `vlm.engine.runner` does between its steps: it
looks at the logits of every row, picks the token by the row's own sampler, and ends rows that
are cancelled, late or complete. So sampling, stopping, streaming and the check for NaN are those of
our own engine, and what a model returns from `generate`, with its prompt or without, is not
looked at. What the folder's generation_config.json asks for (a repetition penalty, say) has
changed the logits by then, also those that logprobs are reckoned from. Shapes: B rows, T
prompt positions, V vocabulary.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vlm.engine.batches import Batches
from vlm.engine.in_order import answer_all
from vlm.engine.request import Completion, Request, Row
from vlm.engine.sampling import next_tokens
from vlm.engine.turns import TurnLock
from vlm.errors import GenerationError

if TYPE_CHECKING:
    from vlm.relative_processor import Inputs, RelativeProcessor

_BATCH = 16  # requests of `generate_all` that run together
# Inputs with T positions in their second dimension, and so padded on the left, all with
# zeros but the first. An aligned input that is not named here is right too: it only keeps
# prompts of different lengths out of one batch.
_ALIGNED = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "image_attention_mask",
    "cross_attention_mask",
)


class GenerateEngine:
    """Owns a model at run time, as `vlm.engine.runner.Engine` does, one call at a time.

    Some of these models keep state between their steps, so parallel answers wait for each
    other, in the order of asking.

    Args:
        model: in evaluation mode; its weights must not change while the engine lives.
        processor: of the same folder.
        identity: of the weights; by default unique to this engine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: "RelativeProcessor",
        identity: str | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.identity = identity or uuid.uuid4().hex[:16]
        self.lock = TurnLock()

    def ahead(self, request: Request) -> Request:
        """The request as it is: preparing it has made its pixels."""
        return request

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests, those with inputs of like shapes as one batch; in their order.

        Raises:
            ContextLengthError: a prompt does not fit; nothing is computed then.
            GenerationError: the model computes NaN.
        """
        rows = [self._row(request) for request in requests]
        alike: dict[Any, list[Row]] = {}
        for row in rows:
            alike.setdefault(_shapes(_tensors(row)), []).append(row)
        for batch in alike.values():
            self._run(batch)
        for row in rows:  # the folder may have set a limit of its own
            row.finish_reason = row.finish_reason or "length"
        return [row.completion() for row in rows]

    def generate_all(
        self, requests: Iterable[Request], places: int = _BATCH
    ) -> Iterator[Completion]:
        """Answer any number of requests, in their order, in batches of at most `places`.

        Raises:
            ContextLengthError: a prompt does not fit; raised in its turn, as the next are.
            GenerationError: the model computes NaN.
            Exception: what `requests` raises, once all requests before it are answered.
        """
        return answer_all(self, requests, places)

    @contextmanager
    def desk(self, places: int) -> Iterator[Batches]:
        """The engine for one job: what it submits between two steps is one batch."""
        yield Batches(self.generate)

    def stream(self, request: Request) -> Iterator[Row]:
        """Answer one request; yields its row after every step, the last time ended.

        Raises:
            ContextLengthError: the prompt does not fit; raised here, before the first step.
            GenerationError: the model computes NaN; raised by a step.
        """
        return self._steps(self._row(request))

    def _row(self, request: Request) -> Row:
        return Row(request, self.processor)

    def _steps(self, row: Row) -> Iterator[Row]:
        """`generate` does not return between its tokens, so it runs in a thread of its own."""
        told: queue.SimpleQueue[BaseException | bool] = queue.SimpleQueue()
        left = threading.Event()

        def work() -> None:
            try:
                self._run([row], left, lambda: told.put(True))
            except BaseException as error:
                told.put(error)
            else:
                told.put(False)

        thread = threading.Thread(target=work, name="vlm-generate", daemon=True)
        thread.start()
        try:
            while (news := told.get()) is True:
                yield row
            if isinstance(news, BaseException):
                raise news
            yield row
        finally:  # also where the reader goes away before the end
            left.set()
            thread.join()

    def _run(
        self,
        rows: list[Row],
        left: threading.Event | None = None,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        """Answer rows as one batch, or leave where `left` is set; `step` runs after each token."""
        with self.lock:
            for row in rows:
                row.cancel_if_asked(time.monotonic())
            rows = [row for row in rows if row.finish_reason is None]
            if not rows or (left is not None and left.is_set()):
                return
            hook = _Hook(rows, self.processor.never_text, left, step)
            eos = sorted(self.processor.eos_token_ids)
            with torch.inference_mode(), _telling_memory(len(rows)):
                self.model.generate(
                    **self._batch(rows),
                    logits_processor=LogitsProcessorList([hook]),
                    stopping_criteria=StoppingCriteriaList([_Stop(hook)]),
                    max_new_tokens=max(row.limit for row in rows),
                    eos_token_id=eos or None,
                    pad_token_id=self.processor.pad_token_id,
                    do_sample=False,  # the hook has drawn the token already
                    num_beams=1,
                    num_return_sequences=1,
                    use_cache=True,
                )

    def _batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        every = [_tensors(row) for row in rows]
        batch: dict[str, torch.Tensor] = {}
        for name in every[0]:
            parts = [tensors[name] for tensors in every]
            if name in _ALIGNED:
                fill = self.processor.pad_token_id if name == "input_ids" else 0
                width = max(part.shape[1] for part in parts)
                parts = [_pad_left(part, width, fill) for part in parts]
            joined = torch.cat(parts).to(self.model.device)
            batch[name] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        return batch


class _Hook(LogitsProcessor):
    """Picks the next token of every row and lets `generate` see no other.

    Args:
        rows: in the order of the batch.
        never_text: tokens that are ruled out.
        left: when set, nobody waits for these answers any more.
        step: told after every token.
    """

    def __init__(
        self,
        rows: list[Row],
        never_text: Sequence[int],
        left: threading.Event | None,
        step: Callable[[], None],
    ) -> None:
        self.rows = rows
        self._never_text = list(never_text)
        self._left = left
        self._step = step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) to ones that leave a single token a row."""
        scores = scores.clone()
        scores[:, self._never_text] = -torch.inf
        draws = next_tokens(scores, [row.sampler for row in self.rows])
        for row, draw in zip(self.rows, draws, strict=True):
            row.cancel_if_asked(time.monotonic())
            if row.finish_reason is None:
                row.take(draw)
        self._step()
        chosen = torch.full_like(scores, -torch.inf)
        tokens = torch.tensor([[draw.token] for draw in draws], device=scores.device)
        return chosen.scatter_(1, tokens, 0.0)

    def ended(self) -> list[bool]:
        """Which rows need no further token."""
        if self._left is not None and self._left.is_set():
            return [True] * len(self.rows)
        return [row.finish_reason is not None for row in self.rows]


class _Stop(StoppingCriteria):
    """Tells `generate` which rows have ended by what the hook knows."""

    def __init__(self, hook: _Hook) -> None:
        self._hook = hook

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Flags (B,)."""
        return torch.tensor(self._hook.ended(), device=input_ids.device)


@contextmanager
def _telling_memory(rows: int) -> Iterator[None]:
    """Memory that ends is an error of these rows, and not of the process."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GenerationError(
            f"out of memory for {rows} answers at a time ({error}); use a smaller batch or "
            "fewer pictures"
        ) from error


def _tensors(row: Row) -> "dict[str, torch.Tensor]":
    prompt: Any = row.request.prompt
    inputs: Inputs = prompt
    return inputs.tensors


def _shapes(tensors: dict[str, torch.Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What must be equal for rows to be joined along the first dimension."""
    return tuple((n, tuple(t.shape[2 if n in _ALIGNED else 1 :])) for n, t in tensors.items())


def _pad_left(tensor: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    """(B, T, ...) to (B, width, ...)."""
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    padding = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), fill)
    return torch.cat([padding, tensor], dim=1)
