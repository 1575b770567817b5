"""Captions for many pictures: read ahead in threads, run in batches, never stop at a bad file.

`vlm.caption_job` takes other sources than files and writes a ledger, so that a run can be
killed and taken up again. Importing this module imports no torch.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlm.errors import ConfigError
from vlm.images import DEFAULT_LIMITS

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.caption_prompts import Caption

_WEB = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
SUFFIXES = frozenset((*_WEB, ".heic", ".heif", ".tif", ".tiff"))
_HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class CaptionResult:
    """What came of one picture: a caption, or an error with its code.

    Attributes:
        path: absolute path; ``file#row`` or ``shard.tar#key`` for a picture without one.
        caption: the text, of the first prompt if there are several; None after an error.
        error: why there is no caption, on one line.
        code: the same in one stable word: those of `vlm.images.load_image`,
            ``"changed"`` for a file that was written to while it was read, ``"unfit"``
            for a picture that this model cannot take, ``"prompt"`` for one that lacks a
            variable of the prompt, ``"context_length"`` for a question that is too long, or
            ``"generation"`` where the model computed no answer.
        finish_reason: as in `vlm.answers.Answer`; ``"length"`` for a caption that was cut.
        sha256: of the encoded bytes; None where they could not be read or are too many.
        size: of the encoded picture in bytes.
        mtime_ns: its file's time of change, in nanoseconds.
        mean_logprob: as in `vlm.answers.Answer`.
        missing: words of ``include`` that the caption lacks.
        unwanted: words of ``discourage`` that it holds.
        captions: of several prompts, by their keys; None where there is one.
        questions: what was asked, where the prompt has variables.
        copy_of: the picture with the same bytes whose caption this is.
        read_ms: to read and decode.
        wait_ms: from then to the model.
        total_ms: from the beginning to the caption.
    """

    path: str
    caption: str | None = None
    error: str | None = None
    code: str | None = None
    finish_reason: str | None = None
    sha256: str | None = None
    size: int | None = None
    mtime_ns: int | None = None
    mean_logprob: float | None = field(default=None, compare=False)  # batches may round it
    missing: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    captions: "dict[str, Caption] | None" = field(default=None, compare=False)
    questions: dict[str, str] | None = None
    copy_of: str | None = None
    read_ms: float | None = field(default=None, compare=False)
    wait_ms: float | None = field(default=None, compare=False)
    total_ms: float | None = field(default=None, compare=False)

    @property
    def status(self) -> str:
        """``"captioned"``, ``"copied"`` or ``"failed"``."""
        if self.error is not None:
            return "failed"
        return "captioned" if self.copy_of is None else "copied"


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
        for found in walk(top) if os.path.isdir(top) else [top]:
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
    from vlm.caption_items import Item
    from vlm.caption_pipeline import results
    from vlm.caption_prompts import CaptionPrompts, literal

    prompts = CaptionPrompts(literal(assistant.caption_prompt if prompt is None else prompt))
    items = (Item(path, path) for path in expand_paths(paths))
    return results(assistant, items, prompts, batch_size, {"max_new_tokens": max_new_tokens})


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless `batch_size` is a whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1")


def walk(top: str) -> Iterator[str]:
    """Pictures below a folder, sorted; last come the folders that may not be listed."""
    closed: list[str] = []
    for folder, subfolders, files in os.walk(top, onerror=lambda e: closed.append(e.filename)):
        subfolders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(folder, name)
    yield from closed


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
