"""Chat messages and JSONL records: what a conversation *is*, before any token.

A conversation is an optional system message, then user and assistant turns in
alternation, starting with the user. Pictures belong to user turns only. Nothing
here imports torch, so data recipes and the command line can use it cheaply.
"""

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from vlm.errors import MessageError, RecordError
from vlm.images import ImageSource

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
RECORD_KEYS = ("id", "images", "messages", "source", "license", "meta")


@dataclass(frozen=True)
class TextPart:
    """A stretch of text inside a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture inside a user message."""

    source: ImageSource


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and the texts and pictures in their order."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text parts joined, pictures left out."""
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The pictures' sources in order."""
        return tuple(part.source for part in self.content if isinstance(part, ImagePart))


def user(text: str, *images: ImageSource) -> Message:
    """A user turn with the pictures before the text."""
    return Message("user", (*(ImagePart(image) for image in images), TextPart(text)))


def assistant(text: str) -> Message:
    """An assistant turn."""
    return Message("assistant", (TextPart(text),))


def parse_messages(raw: Sequence[Message | Mapping[str, Any]]) -> list[Message]:
    """Check a conversation and return it as messages.

    Args:
        raw: messages, or mappings ``{"role", "content"}`` whose content is a string or
            a list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": source}``.

    Raises:
        MessageError: the conversation breaks a rule; the message names the turn and the way out.
    """
    messages = [_as_message(entry, f"message {i + 1}") for i, entry in enumerate(raw)]
    check_order(messages)
    for i, message in enumerate(messages):
        check_content(message, f"message {i + 1}")
    return messages


def check_order(messages: Sequence[Message]) -> None:
    """Raise MessageError unless the roles are [system] (user assistant)* [user]."""
    turns = [m.role for m in messages]
    if turns and turns[0] == "system":
        turns = turns[1:]
    if not messages:
        raise MessageError("the conversation is empty; give at least one user message")
    if "system" in turns:
        raise MessageError("a system message must be the first one, and there is at most one")
    if "user" not in turns:
        raise MessageError("the conversation has no user message; add one with the question")
    for i, role in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            raise MessageError(
                f"turn {i + 1} is from the {role}; user and assistant must alternate, user first"
            )


def _as_message(entry: Message | Mapping[str, Any], where: str) -> Message:
    if isinstance(entry, Message):
        if entry.role not in ROLES:
            raise MessageError(f"{where}: unknown role {entry.role!r}; use {', '.join(ROLES)}")
        return entry
    if not isinstance(entry, Mapping):
        raise MessageError(f"{where} is a {type(entry).__name__}; give a mapping role/content")
    _only_keys(entry, ("role", "content"), where)
    role = entry.get("role")
    if role not in ROLES:
        raise MessageError(f"{where}: unknown role {role!r}; use {', '.join(ROLES)}")
    content = entry.get("content")
    if isinstance(content, str):
        return Message(cast(Role, role), (TextPart(content),))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise MessageError(f"{where}: content must be a string or a list of parts")
    parts = (_as_part(part, f"{where}, part {j + 1}") for j, part in enumerate(content))
    return Message(cast(Role, role), tuple(parts))


def _as_part(raw: object, where: str) -> Part:
    if isinstance(raw, TextPart | ImagePart):
        return raw
    if not isinstance(raw, Mapping):
        raise MessageError(f"{where} is a {type(raw).__name__}; give a mapping with a type")
    kind = raw.get("type")
    if kind == "text":
        _only_keys(raw, ("type", "text"), where)
        if not isinstance(raw.get("text"), str):
            raise MessageError(f"{where}: a text part needs a string 'text'")
        return TextPart(raw["text"])
    if kind == "image":
        _only_keys(raw, ("type", "image"), where)
        if raw.get("image") is None:
            raise MessageError(f"{where}: an image part needs 'image': a path, bytes or a picture")
        return ImagePart(raw["image"])
    raise MessageError(f"{where}: unknown type {kind!r}; use text or image")


def _only_keys(raw: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in known:
            raise MessageError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def nearest(key: str, known: Iterable[str]) -> str:
    """The phrase that offers the known key most like `key`, or lists all of them."""
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def check_content(message: Message, where: str) -> None:
    """Raise MessageError unless a message has text, all of it Unicode, and pictures of a user."""
    for part in message.content:
        if isinstance(part, TextPart):
            _check_text(part.text, where)
        elif message.role != "user":
            raise MessageError(f"{where}: a picture in a {message.role} message; move it to a user")
    if not message.text.strip():
        what = "question" if message.role == "user" else "text"
        raise MessageError(f"{where}: the {what} of the {message.role} is empty; write some text")


def _check_text(text: str, where: str) -> None:
    if not isinstance(text, str):
        raise MessageError(f"{where}: text is a {type(text).__name__}, not a string")
    if "\0" in text:
        raise MessageError(f"{where}: the text has a NUL character; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MessageError(f"{where}: the text has a lone surrogate; it is not Unicode") from None


@dataclass(frozen=True)
class Record:
    """One training or evaluation example.

    `images` are absolute paths, or encoded bytes of pictures that came inside a table.
    The messages may be absent (a picture alone) and the pictures too (text alone).
    """

    id: str
    images: tuple[str | bytes, ...] = ()
    messages: tuple[Message, ...] = ()
    source: str | None = None
    license: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Stream the records of a JSONL file; image paths are relative to its folder.

    Raises:
        RecordError: naming the file, the line and the reason.
    """
    path = Path(path)
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_record(line, path.parent, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise RecordError(f"{path}, after line {number}: not UTF-8 text") from error


def parse_record(line: str, folder: Path, where: str) -> Record:
    """One JSONL line to a record whose pictures are bound to absolute paths."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not JSON ({error})") from error
    return build_record(raw, folder, where)


def build_record(raw: Any, folder: Path | None, where: str) -> Record:
    """A decoded object to a record; a picture is a path relative to `folder`, or bytes.

    Without a folder the paths are absolute and free of links already.

    Raises:
        RecordError: beginning with `where`.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: a record must be a JSON object, not {type(raw).__name__}")
    for key in raw:
        if key not in RECORD_KEYS:
            raise RecordError(f"{where}: unknown key {key!r}{nearest(key, RECORD_KEYS)}")
    _check_fields(raw, where)
    images = tuple(
        image if isinstance(image, bytes) or folder is None else _absolute(folder, image, where)
        for image in raw.get("images", [])
    )
    try:
        messages = parse_messages(_bind(raw["messages"], images)) if raw.get("messages") else []
    except MessageError as error:
        raise RecordError(f"{where}: {error}") from error
    return Record(
        id=raw["id"],
        images=images,
        messages=tuple(messages),
        source=raw.get("source"),
        license=raw.get("license"),
        meta=raw.get("meta") or {},
    )


def _absolute(folder: Path, image: str, where: str) -> str:
    try:
        return str((folder / image).resolve())
    except (RuntimeError, ValueError, OSError) as error:  # a link to itself, a NUL, too long
        raise RecordError(f"{where}: {image[:80]!r} leads nowhere ({error})") from error


def _check_fields(raw: Mapping[str, Any], where: str) -> None:
    if not isinstance(raw.get("id"), str) or not raw["id"]:
        raise RecordError(f"{where}: 'id' must be a non-empty string")
    images = raw.get("images", [])
    if not isinstance(images, list) or not all(isinstance(i, str | bytes) and i for i in images):
        raise RecordError(f"{where}: 'images' must be a list of paths")
    if not isinstance(raw.get("messages", []), list):
        raise RecordError(f"{where}: 'messages' must be a list")
    for key in ("source", "license"):
        if not isinstance(raw.get(key), str | None):
            raise RecordError(f"{where}: {key!r} must be a string")
    if not isinstance(raw.get("meta"), dict | None):
        raise RecordError(f"{where}: 'meta' must be an object")


def _bind(messages: list[Any], images: Sequence[str | bytes]) -> list[Any]:
    """Give each ``{"type": "image"}`` part its path; counts must agree."""
    waiting = list(images)
    bound: list[Any] = []
    wanted = 0
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            bound.append(message)
            continue
        parts = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "image":
                wanted += 1
                if set(part) != {"type"}:
                    raise MessageError('an image part is {"type": "image"}; paths go to "images"')
                part = {"type": "image", "image": waiting.pop(0) if waiting else ""}
            parts.append(part)
        bound.append({**message, "content": parts})
    if wanted != len(images):
        raise MessageError(f"{len(images)} images but {wanted} image parts; they must be as many")
    return bound
