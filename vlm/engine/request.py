"""What goes into the engine and what comes out."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from vlm.engine.bias import Bias
from vlm.engine.grammar import Grammar
from vlm.engine.loops import LoopDetector
from vlm.engine.sampling import Draw, Sampler, Sampling
from vlm.engine.stops import StopText, num_needed
from vlm.errors import ContextLengthError
from vlm.processor import Encoded

DEFAULT_MAX_NEW_TOKENS = 256

FinishReason = Literal["stop", "length", "repetition", "cancelled", "deadline"]
Likeliest = tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be answered.

    Args:
        prompt: ends with the opening of the assistant's turn.
        sampling: how the answer is drawn.
        stop: when set, the answer ends before the next decode step.
        pixel_values: (pictures of the prompt, 3, H, W) if the caller has made them
            already, for example in another thread; otherwise the engine makes them.
        keep: leave keys and values behind, for a later prompt that begins like this one
            and its answer.
        deadline: by `time.monotonic`, when the answer ends as it is.
    """

    prompt: Encoded
    sampling: Sampling = field(default_factory=Sampling)
    stop: threading.Event | None = None
    pixel_values: torch.Tensor | None = None
    keep: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class Completion:
    """The tokens of one answer, without the one that ended it.

    Attributes:
        ids: generated tokens; before a stop string, those that `text` comes from.
        finish_reason: ``"stop"`` at an end-of-sequence token or a stop string, ``"length"``
            at max_new_tokens or the end of the context, ``"repetition"`` in a loop (see
            `vlm.engine.loops`), ``"cancelled"`` by `Request.stop`, ``"deadline"`` at
            `Request.deadline`.
        num_prompt_tokens: positions of the prompt, visual tokens included.
        logprobs: of each id, see `vlm.engine.sampling`; so the token that ended the
            answer does not count.
        top_logprobs: (token, logprob) pairs of the likeliest tokens at the place of each
            id, likeliest first; None unless `Sampling.logprobs` asks for them.
        text: of an answer with stop strings, which may end inside its last token; None
            without, where the ids decode to the text.
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[Likeliest, ...] | None = None
    text: str | None = None


class Reader(Protocol):
    """What a row must know of the processor of its model."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def context_length(self) -> int:
        """Positions that the model has."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer; spells the words of a bias."""

    @property
    def never_text(self) -> Sequence[int]:
        """Tokens that stand for pictures and the like."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens left out."""


class Row:
    """A request on its way through the engine.

    Args:
        request: what is asked.
        processor: of the model.

    Attributes:
        ids: tokens so far; it only grows, so a stop string's tokens stay.
        logprobs: of each id.
        top_logprobs: of each id, if asked for.
        finish_reason: set once, from any thread.
        limit: the most tokens that it may take.

    Raises:
        ContextLengthError: the prompt leaves no room for one token of an answer.
        ConfigError: `logit_bias` names a token that the model does not have, or
            `json_schema` cannot be followed.
    """

    def __init__(self, request: Request, processor: Reader) -> None:
        sampling = request.sampling
        self.request = request
        ids, biases = request.prompt.input_ids, sampling.logit_bias
        bias = Bias(biases, processor.tokenizer, ids) if biases else None
        schema = sampling.json_schema
        grammar = (
            Grammar(str(schema), processor.tokenizer, processor.eos_token_ids) if schema else None
        )
        self.sampler = Sampler(sampling, ids, processor.never_text, bias, grammar)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[Likeliest] = []
        self.finish_reason: FinishReason | None = None
        self._eos = processor.eos_token_ids
        self._decode = processor.decode
        strings = sampling.stop_strings
        self._stops = StopText(strings, processor.decode) if strings else None
        self._loops = LoopDetector() if sampling.stop_loops else None
        context_length = processor.context_length
        room = context_length - len(request.prompt.input_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt.input_ids)} positions and the answer needs "
                f"at least 1 more, but the model has {context_length}; shorten the "
                "conversation or use fewer pictures"
            )
        self.limit = min(sampling.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room)

    @property
    def text(self) -> str | None:
        """With stop strings: the text that is certain, which only grows. None without."""
        if self._stops is None:
            return None
        return self._stops.text if self.finish_reason is None else self._stops.final()[0]

    def cancel_if_asked(self, now: float | None = None) -> None:
        """End the row if its stop event is set, or its deadline is over `now`."""
        stop, deadline = self.request.stop, self.request.deadline
        if self.finish_reason is not None:
            return
        if stop is not None and stop.is_set():
            self.finish_reason = "cancelled"
        elif deadline is not None and now is not None and now >= deadline:
            self.finish_reason = "deadline"

    def take(self, draw: Draw) -> None:
        """Add a token, which may end the row; an end-of-sequence token is not kept.

        Where several reasons to end meet, a stop string goes before a loop, and a loop
        before the limit.
        """
        token = draw.token
        if token in self._eos:
            self.finish_reason = "stop"
            return
        if self.request.sampling.logprobs is not None:
            self.top_logprobs.append(draw.likeliest)
        self.logprobs.append(draw.logprob)
        self.ids.append(token)  # last of the three, for readers in other threads
        if self._stops is not None and self._stops.add(token):
            self.finish_reason = "stop"
        elif self._loops is not None and self._loops.add(token):
            self.finish_reason = "repetition"
        elif len(self.ids) >= self.limit:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """The result of an ended row."""
        assert self.finish_reason is not None, "the row is still running"
        reason, text, number = self.finish_reason, None, len(self.ids)
        if self._stops is not None:
            text, found = self._stops.final()
            if found:
                reason, number = "stop", num_needed(self.ids, text, self._decode)
        asked = self.request.sampling.logprobs is not None
        return Completion(
            tuple(self.ids[:number]),
            reason,
            len(self.request.prompt.input_ids),
            tuple(self.logprobs[:number]),
            tuple(self.top_logprobs[:number]) if asked else None,
            text,
        )
