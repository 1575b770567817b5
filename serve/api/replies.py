"""Replies in the shape of the OpenAI API, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.api.told import token_entry
from vlm.answers import Answer
from vlm.engine.request import FinishReason, Request

DONE = b"data: [DONE]\n\n"
_REASONS = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Envelope:
    """What all parts of one reply have in common."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """A reply that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": _logprobs(answer),
                **ending(answer.finish_reason),
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def chunk(self, index: int, delta: dict[str, Any], **more: Any) -> bytes:
        """A piece of a streamed choice."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk, if it was asked for."""
        head = self._head("chat.completion.chunk")
        return event({**head, "choices": [], "usage": usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n".encode()


def ending(reason: FinishReason) -> dict[str, Any]:
    """Why an answer ended: OpenAI's word for it, and ours where it says more."""
    known = _REASONS.get(reason)
    return {"finish_reason": known or "length", "stop_reason": None if known else reason}


def usage_of(request: Request, image_token: int | None, num_new_tokens: int) -> dict[str, Any]:
    """Token counts; those of the prompt include its visual tokens."""
    ids = request.prompt.input_ids
    visual = 0 if image_token is None else ids.count(image_token)
    return {
        "prompt_tokens": len(ids),
        "completion_tokens": num_new_tokens,
        "total_tokens": len(ids) + num_new_tokens,
        "prompt_tokens_details": {"image_tokens": visual, "text_tokens": len(ids) - visual},
    }


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if answer.tokens is None:
        return None
    entries = [token_entry(t.piece, t.logprob, t.alternatives) for t in answer.tokens]
    return {"content": entries, "refusal": None}
