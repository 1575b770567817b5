"""What goes into the engine and what comes out."""

import threading
from dataclasses import dataclass, field
from typing import Literal

import torch

from vlm.engine.sampling import Sampler, Sampling
from vlm.errors import ContextLengthError
from vlm.processor import Encoded

DEFAULT_MAX_NEW_TOKENS = 256

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be answered.

    Args:
        prompt: ends with the opening of the assistant's turn.
        sampling: how the answer is drawn.
        stop: when set, the answer ends before the next decode step.
        pixel_values: (pictures of the prompt, 3, H, W) if the caller has made them
            already, for example in another thread; otherwise the engine makes them.
    """

    prompt: Encoded
    sampling: Sampling = field(default_factory=Sampling)
    stop: threading.Event | None = None
    pixel_values: torch.Tensor | None = None


@dataclass(frozen=True)
class Completion:
    """The tokens of one answer, without the one that ended it.

    Attributes:
        ids: generated tokens.
        finish_reason: ``"stop"`` at an end-of-sequence token, ``"length"`` at
            max_new_tokens or the end of the context, ``"cancelled"`` by `Request.stop`.
        num_prompt_tokens: positions of the prompt, visual tokens included.
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int


class Row:
    """A request on its way through the engine.

    Args:
        request: what is asked.
        eos: tokens that end an answer.
        context_length: positions that the model has.

    Raises:
        ContextLengthError: the prompt leaves no room for one token of an answer.
    """

    def __init__(self, request: Request, eos: frozenset[int], context_length: int) -> None:
        self.request = request
        self.sampler = Sampler(request.sampling)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos = eos
        room = context_length - len(request.prompt.input_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt.input_ids)} positions and the answer needs "
                f"at least 1 more, but the model has {context_length}; shorten the "
                "conversation or use fewer pictures"
            )
        self._limit = min(request.sampling.max_new_tokens or DEFAULT_MAX_NEW_TOKENS, room)

    def cancel_if_asked(self) -> None:
        """End the row if its stop event is set."""
        stop = self.request.stop
        if self.finish_reason is None and stop is not None and stop.is_set():
            self.finish_reason = "cancelled"

    def take(self, token: int) -> None:
        """Add a token, which may end the row; the ending token itself is not kept."""
        if token in self._eos:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        if len(self.ids) >= self._limit:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        """The result of an ended row."""
        assert self.finish_reason is not None, "the row is still running"
        num_prompt_tokens = len(self.request.prompt.input_ids)
        return Completion(tuple(self.ids), self.finish_reason, num_prompt_tokens)
