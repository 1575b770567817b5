"""One item of a captioning run: read, hashed, decoded and prepared; errors as results."""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm.caption_items import Item
from vlm.caption_prompts import CaptionPrompts
from vlm.captioning import CaptionResult, file_facts
from vlm.errors import ConfigError, ContextLengthError, ImageError, MessageError, VlmError
from vlm.image_bytes import shorten
from vlm.images import CleanImage, load_image
from vlm.messages import user

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.engine.request import Request

Find = Callable[[bytes], CaptionResult | None]


@dataclass(frozen=True)
class Read:
    """An item that has been read.

    Attributes:
        result: as far as it is known: final if there is nothing to run.
        requests: to run, by the keys of their prompts.
        same: see `CaptionPrompts.same`.
        started: by `time.monotonic`; 0 for a file that changed meanwhile.
        ended: when it was ready.
    """

    result: CaptionResult
    requests: "Mapping[str, Request]" = field(default_factory=dict)
    same: bytes = b""
    started: float = 0.0
    ended: float = 0.0


@dataclass(frozen=True)
class Reader:
    """Reads and prepares one item; called from several threads.

    Args:
        assistant: prepares requests.
        prompts: what is asked.
        sampling: of `vlm.assistant.SamplingOptions`.
        find: an earlier result by `CaptionPrompts.same`.

    Raises:
        ConfigError, MessageError, ContextLengthError: when called, of a prompt without
            variables; it is the same for every picture.
    """

    assistant: "Assistant"
    prompts: CaptionPrompts
    sampling: Mapping[str, Any]
    find: Find | None

    def __call__(self, item: Item) -> Read:
        """Read it."""
        started = time.monotonic()
        before = file_facts(item.path) if item.path is not None else (None, None)
        result = CaptionResult(item.name, size=before[0], mtime_ns=before[1])
        requests: Mapping[str, Request] = {}
        same = b""
        try:
            questions = self.prompts.questions(item.meta)
            if self.prompts.variables:
                result = dataclasses.replace(result, questions=dict(questions))
            loaded = item.load()
            if isinstance(loaded, bytes):
                data: bytes | CleanImage = loaded
                digest = hashlib.sha256(loaded).hexdigest()
                result = dataclasses.replace(result, sha256=digest, size=len(loaded))
            else:
                data = load_image(loaded, name=item.name)
                result = dataclasses.replace(result, sha256=data.sha256)
            same = self.prompts.same(result.sha256 or "", questions)
            known = None if self.find is None else self.find(same)
            if known is not None:
                result = copied(result, known)
            else:
                requests = self._prepare(data, item.name, questions)
        except ImageError as error:
            result = failed(result, error, error.code)
        except (ConfigError, MessageError, ContextLengthError) as error:
            if not self.prompts.variables:
                raise
            too_long = isinstance(error, ContextLengthError)
            result = failed(result, error, "context_length" if too_long else "prompt")
        if item.path is not None and file_facts(item.path) != before:
            name = shorten(item.path)
            text = f"{name} changed while it was read; run again once it is complete"
            return Read(CaptionResult(item.name, error=text, code="changed"))
        ended = time.monotonic()
        result = dataclasses.replace(result, read_ms=milliseconds(ended - started))
        return Read(result, requests, same, started, ended)

    def _prepare(self, data: Any, name: str, questions: Mapping[str, str]) -> "dict[str, Request]":
        """A request for each question; the picture is decoded once."""
        draft_to = getattr(self.assistant.processor, "draft_to", None)
        shown = shorten(name) if os.path.isabs(name) else name
        picture = load_image(data, draft_to=draft_to, name=shown)
        (first, text), *others = questions.items()
        found = {first: self.assistant.prepare_ahead(picture, text, **self.sampling)}
        for key, text in others:  # their visual tokens are those of the first, by the cache
            found[key] = self.assistant.prepare([user(text, picture)], **self.sampling)
        return found


def copied(result: CaptionResult, source: CaptionResult) -> CaptionResult:
    """The result with the captions, or the error, of a picture with the same bytes."""
    return dataclasses.replace(
        source,
        path=result.path,
        sha256=result.sha256,
        size=result.size,
        mtime_ns=result.mtime_ns,
        copy_of=source.copy_of or source.path,
    )


def failed(result: CaptionResult, error: VlmError, code: str) -> CaptionResult:
    """The result of a picture that has no caption."""
    return dataclasses.replace(result, error=" ".join(str(error).split()), code=code)


def milliseconds(seconds: float) -> float:
    """Rounded as rows have them."""
    return round(1000 * seconds, 2)
