"""Items to results, in order: read ahead in threads, run in batches, errors as results."""

import dataclasses
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm.caption_items import Item
from vlm.caption_prompts import Caption, CaptionPrompts
from vlm.captioning import CaptionResult, file_facts
from vlm.errors import (
    ConfigError,
    ContextLengthError,
    GenerationError,
    ImageError,
    MessageError,
    VlmError,
)
from vlm.image_bytes import shorten
from vlm.images import CleanImage, load_image
from vlm.messages import user

if TYPE_CHECKING:
    from vlm.answers import Answer
    from vlm.assistant import Assistant
    from vlm.engine.request import Request

_READERS = 4
_BATCHES_AHEAD = 2
_LONGEST_WAIT = 4  # batches of items, bad ones among them, before the good ones run

Find = Callable[[bytes], CaptionResult | None]


@dataclass(frozen=True)
class _Read:
    """An item that has been read: its result so far, and what to run if it is a picture."""

    result: CaptionResult
    requests: "Mapping[str, Request]" = field(default_factory=dict)
    same: bytes = b""
    started: float = 0.0
    ended: float = 0.0


def results(
    assistant: "Assistant",
    items: Iterable[Item],
    prompts: CaptionPrompts,
    batch_size: int,
    sampling: Mapping[str, Any],
    find: Find | None = None,
) -> Iterator[CaptionResult]:
    """A result for each item, in their order.

    Args:
        assistant: does the work.
        items: read lazily, at most two batches ahead.
        prompts: what is asked of each.
        batch_size: pictures that run together.
        sampling: of `vlm.assistant.SamplingOptions`.
        find: an earlier result by `CaptionPrompts.same`; with it, pictures of the same
            bytes are captioned once and copied. Called from several threads.

    Raises:
        ContextLengthError: a prompt without variables is too long for the model.
        GenerationError: the model computes no answer for any picture of a batch.
    """
    read = _Reader(assistant, prompts, sampling, find)
    run = _Runner(assistant, prompts, find)
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="vlm-read")
    try:
        batch: list[_Read] = []
        pictures = 0
        for entry in _ahead(pool, read, items, _BATCHES_AHEAD * batch_size):
            batch.append(entry)
            pictures += bool(entry.requests)
            # Bad files wait for no batch, or a long row of them would hold everything back.
            if pictures in (0, batch_size) or len(batch) >= _LONGEST_WAIT * batch_size:
                yield from run(batch)
                batch, pictures = [], 0
        yield from run(batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[Item], _Read], items: Iterable[Item], number: int
) -> Iterator[_Read]:
    """Read items in threads, at most `number` ahead, in order."""
    pending: deque[Future[_Read]] = deque()
    for item in items:
        pending.append(pool.submit(read, item))
        if len(pending) > number:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@dataclass(frozen=True)
class _Reader:
    """Reads and prepares one item; called from several threads."""

    assistant: "Assistant"
    prompts: CaptionPrompts
    sampling: Mapping[str, Any]
    find: Find | None

    def __call__(self, item: Item) -> _Read:
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
                result = _copied(result, known)
            else:
                requests = self._prepare(data, item.name, questions)
        except ImageError as error:
            result = _failed(result, error, error.code)
        except (ConfigError, MessageError, ContextLengthError) as error:
            if not self.prompts.variables:
                raise  # it is the same for every picture
            too_long = isinstance(error, ContextLengthError)
            result = _failed(result, error, "context_length" if too_long else "prompt")
        if item.path is not None and file_facts(item.path) != before:
            name = shorten(item.path)
            text = f"{name} changed while it was read; run again once it is complete"
            return _Read(CaptionResult(item.name, error=text, code="changed"))
        ended = time.monotonic()
        result = dataclasses.replace(result, read_ms=_ms(ended - started))
        return _Read(result, requests, same, started, ended)

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


@dataclass(frozen=True)
class _Runner:
    """Runs what a batch holds and completes its results."""

    assistant: "Assistant"
    prompts: CaptionPrompts
    find: Find | None

    def __call__(self, batch: Sequence[_Read]) -> Iterator[CaptionResult]:
        begun = time.monotonic()
        todo: dict[bytes | int, _Read] = {}
        for number, entry in enumerate(batch):
            if entry.requests:
                todo.setdefault(number if self.find is None else entry.same, entry)
        known = {k: self.find(k) for k in todo if isinstance(k, bytes) and self.find}
        for each, found in known.items():
            if found is not None:  # captioned since it was read
                del todo[each]
        answers = dict(zip(todo, self._answers(list(todo.values())), strict=True))
        for place, entry in enumerate(batch):
            result = entry.result
            if entry.requests:
                key: bytes | int = place if self.find is None else entry.same
                source = known.get(key) if isinstance(key, bytes) else None
                first = todo.get(key)
                if source is None and first is not None:
                    source = self._result(first.result, answers[key])
                assert source is not None
                result = source if first is entry else _copied(result, source)
            if not entry.started:  # a file that changed
                yield result
                continue
            yield dataclasses.replace(
                result,
                read_ms=entry.result.read_ms,
                wait_ms=_ms(begun - entry.ended),
                total_ms=_ms(time.monotonic() - entry.started),
            )

    def _result(
        self, result: CaptionResult, answer: "dict[str, Caption] | VlmError"
    ) -> CaptionResult:
        if isinstance(answer, VlmError):
            code = "context_length" if isinstance(answer, ContextLengthError) else "generation"
            return _failed(result, answer, code)
        first = next(iter(answer.values()))
        return dataclasses.replace(
            result,
            caption=first.text,
            finish_reason=first.finish_reason,
            mean_logprob=first.mean_logprob,
            missing=first.missing,
            unwanted=first.unwanted,
            captions=answer if self.prompts.several else None,
        )

    def _answers(self, entries: Sequence[_Read]) -> "list[dict[str, Caption] | VlmError]":
        """Captions by prompt for each entry, or what went wrong with it alone."""
        try:
            return list(self._captions(entries))
        except (ContextLengthError, GenerationError) as error:
            if isinstance(error, ContextLengthError) and not self.prompts.variables:
                raise
            if len(entries) == 1:
                return [error]
        found: list[dict[str, Caption] | VlmError] = []
        for entry in entries:  # one picture must not take the others with it
            found += self._answers([entry])
        errors = [each for each in found if isinstance(each, GenerationError)]
        if len(errors) == len(found):
            raise errors[0]
        return found

    def _captions(self, entries: Sequence[_Read]) -> Iterator[dict[str, Caption]]:
        requests = [request for entry in entries for request in entry.requests.values()]
        answers = iter(self.assistant.run(requests))
        for entry in entries:
            taken = {key: next(answers) for key in entry.requests}
            yield {key: self._caption(answer) for key, answer in taken.items()}

    def _caption(self, answer: "Answer") -> Caption:
        logprob = answer.mean_logprob
        rounded = None if logprob is None else round(logprob, 6)
        return self.prompts.caption(answer.text, answer.finish_reason, rounded)


def _copied(result: CaptionResult, source: CaptionResult) -> CaptionResult:
    """The result with the captions, or the error, of a picture with the same bytes."""
    return dataclasses.replace(
        source,
        path=result.path,
        sha256=result.sha256,
        size=result.size,
        mtime_ns=result.mtime_ns,
        copy_of=source.copy_of or source.path,
    )


def _failed(result: CaptionResult, error: VlmError, code: str) -> CaptionResult:
    return dataclasses.replace(result, error=" ".join(str(error).split()), code=code)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
