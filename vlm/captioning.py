"""Captions for many pictures: read ahead in threads, run in batches, never stop at a bad file.

`vlm.ledger` writes the results down so that a run can be killed and taken up again.
Importing this module imports no torch.
"""

import dataclasses
import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.errors import ConfigError, ImageError
from vlm.image_bytes import shorten
from vlm.images import DEFAULT_LIMITS
from vlm.messages import parse_messages, user

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.engine.request import Request

_WEB = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
SUFFIXES = frozenset((*_WEB, ".heic", ".heif", ".tif", ".tiff"))
_READERS = 4
_BATCHES_AHEAD = 2
_LONGEST_WAIT = 4  # batches of files, bad ones among them, before the good ones run
_HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class CaptionResult:
    """What came of one file: a caption, or an error with its code.

    Attributes:
        path: absolute path.
        caption: the text; None after an error.
        error: why there is no caption, on one line.
        code: the same in one stable word: those of `vlm.images.load_image`,
            ``"changed"`` for a file that was written to while it was read, or ``"unfit"``
            for a picture that this model cannot take.
        finish_reason: ``"stop"``, or ``"length"`` for a caption that was cut.
        sha256: of the file's bytes; None where it could not be read or is too large.
        size: of the file in bytes.
        mtime_ns: its time of change, in nanoseconds.
    """

    path: str
    caption: str | None = None
    error: str | None = None
    code: str | None = None
    finish_reason: str | None = None
    sha256: str | None = None
    size: int | None = None
    mtime_ns: int | None = None


def expand_paths(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Absolute paths of files, each once, in order.

    A folder gives the pictures below it, sorted, by the allow-listed `SUFFIXES`; links to
    folders are not followed. Anything else is passed on as it is, so that a missing or
    unreadable file or folder becomes a result that says so.
    """
    seen: set[str] = set()
    for path in paths:
        name = os.fspath(path)
        top = name if "://" in name else os.path.abspath(name)  # the gate refuses URLs by name
        for found in _walk(top) if os.path.isdir(top) else [top]:
            if found not in seen:
                seen.add(found)
                yield found


def caption_many(
    assistant: "Assistant",
    paths: Iterable[str | os.PathLike[str]],
    *,
    batch_size: int = 16,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> Iterator[CaptionResult]:
    """Caption files and folders; one result each, in the order of `expand_paths`.

    The captions are those of `Assistant.caption`, whatever the batch size. A file that
    cannot be used gives a result with `error` and `code` and never stops the rest.

    Args:
        assistant: does the work.
        paths: files and folders; read lazily.
        batch_size: pictures that run together.
        prompt: replaces the model's own captioning question.
        max_new_tokens: the most tokens of a caption.

    Raises:
        ConfigError: a bad batch size or max_new_tokens.
        MessageError: an empty prompt.
        ContextLengthError: the prompt is too long for the model.
    """
    check_batch_size(batch_size)
    question = assistant.caption_prompt if prompt is None else prompt
    parse_messages([user(question)])
    reader = _Reader(assistant, question, max_new_tokens)
    return _results(assistant, reader, expand_paths(paths), batch_size)


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless `batch_size` is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1")


def _walk(top: str) -> Iterator[str]:
    closed: list[str] = []
    for folder, subfolders, files in os.walk(top, onerror=lambda e: closed.append(e.filename)):
        subfolders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(folder, name)
    yield from closed  # folders that may not be listed


@dataclass(frozen=True)
class _Read:
    """A file that has been read: its result so far, and what to run if it is a picture."""

    result: CaptionResult
    request: "Request | None" = None


@dataclass(frozen=True)
class _Reader:
    """Reads and prepares one file; called from several threads."""

    assistant: "Assistant"
    question: str
    max_new_tokens: int | None

    def __call__(self, path: str) -> _Read:
        before = file_facts(path)
        request, refusal = None, None
        try:
            request = self.assistant.prepare_ahead(
                path, self.question, max_new_tokens=self.max_new_tokens
            )
        except ImageError as error:
            refusal = error
        size, _ = before
        digest = file_sha256(path) if size is not None else None
        if file_facts(path) != before:
            text = f"{shorten(path)} changed while it was read; run again once it is complete"
            return _Read(CaptionResult(path, error=text, code="changed"))
        result = CaptionResult(path, None, None, None, None, digest, *before)
        if refusal is not None:
            return _Read(dataclasses.replace(result, error=str(refusal), code=refusal.code))
        return _Read(result, request)


def file_facts(path: str) -> tuple[int | None, int | None]:
    """Size in bytes and time of change in nanoseconds; None for what is no readable file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None, None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (None, None)


def file_sha256(path: str) -> str | None:
    """SHA-256 of a file's bytes; None if it cannot be read or is over the gate's byte cap."""
    digest = hashlib.sha256()
    try:
        if os.path.getsize(path) > DEFAULT_LIMITS.max_bytes:
            return None
        with open(path, "rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _results(
    assistant: "Assistant", read: Callable[[str], _Read], paths: Iterator[str], batch_size: int
) -> Iterator[CaptionResult]:
    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="vlm-read")
    try:
        batch: list[_Read] = []
        pictures = 0
        for item in _ahead(pool, read, paths, _BATCHES_AHEAD * batch_size):
            batch.append(item)
            pictures += item.request is not None
            # Bad files wait for no batch, or a long row of them would hold everything back.
            if pictures in (0, batch_size) or len(batch) >= _LONGEST_WAIT * batch_size:
                yield from _run(assistant, batch)
                batch, pictures = [], 0
        yield from _run(assistant, batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[str], _Read], paths: Iterator[str], number: int
) -> Iterator[_Read]:
    """Read files in threads, at most `number` ahead, in order."""
    pending: deque[Future[_Read]] = deque()
    for path in paths:
        pending.append(pool.submit(read, path))
        if len(pending) > number:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _run(assistant: "Assistant", batch: list[_Read]) -> Iterator[CaptionResult]:
    answers = iter(assistant.run([entry.request for entry in batch if entry.request is not None]))
    for entry in batch:
        if entry.request is None:
            yield entry.result
        else:
            answer = next(answers)
            yield dataclasses.replace(
                entry.result, caption=answer.text, finish_reason=answer.finish_reason
            )
