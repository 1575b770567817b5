"""One row of any container, and the checks that all converters share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.pictures import Pictures
from vlm.errors import MessageError
from vlm.messages import ImagePart, Message, Part, Record, TextPart, parse_messages

CAPTION_QUESTION = "Provide a brief description of the given image."
PLACE = "<image>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True)
class Row:
    """What a converter gets.

    Attributes:
        raw: the row; keys whose value is null are left out.
        id: for a row that has none of its own.
        pictures: binds its pictures.
    """

    raw: Mapping[str, Any]
    id: str
    pictures: Pictures

    def name(self, *keys: str) -> str:
        """The row's own id as text, or else the one made for it."""
        for key in keys or ("id",):
            if isinstance(self.raw.get(key), str | int) and str(self.raw[key]):
                return str(self.raw[key])
        return self.id

    def record(
        self,
        images: Sequence[str | bytes],
        messages: Iterable[Message],
        used: Iterable[str],
        id: str | None = None,
    ) -> Record:
        """The record, checked; keys that are not `used` are kept under ``meta``.

        Raises:
            FaultError: the conversation breaks a rule.
        """
        found = list(messages)
        try:
            checked = parse_messages(found) if found else []
        except MessageError as error:
            raise FaultError(str(error), "malformed") from error
        texts = {key: self.raw.get(key) for key in ("source", "license")}
        texts = {key: value for key, value in texts.items() if isinstance(value, str)}
        meta = self.raw.get("meta")
        left = dict(meta) if isinstance(meta, Mapping) else {}
        known = {*used, "id", *texts, *(["meta"] if isinstance(meta, Mapping) else [])}
        left.update((key, value) for key, value in self.raw.items() if key not in known)
        return Record(id or self.name(), tuple(images), tuple(checked), **texts, meta=left)


def role_of(value: Any, where: str) -> Any:
    """The role by any of its usual names.

    >>> role_of("gpt", "turn 2")
    'assistant'
    """
    if not isinstance(value, str) or value.lower() not in _ROLES:
        known = ", ".join(_ROLES)
        raise FaultError(f"{where}: unknown role {value!r}; known: {known}", "malformed")
    return _ROLES[value.lower()]


def place(texts: Sequence[tuple[str, str]], images: Sequence[str | bytes]) -> list[Message]:
    r"""Turns of (role, text) with ``<image>`` where a picture stands, to messages.

    One line break beside a placeholder belongs to it; text is kept otherwise. Without
    pictures a placeholder is text, and so it is in what the assistant says.

    >>> place([("user", "<image>\nWhat?"), ("assistant", "A cat.")], ["a.jpg"])[0].content
    (ImagePart(source='a.jpg'), TextPart(text='What?'))

    Raises:
        FaultError: ``image_mismatch``: not as many placeholders as pictures.
    """
    wanted = sum(text.count(PLACE) for role, text in texts if role == "user") if images else 0
    if wanted != len(images) and texts:
        reason = f"{len(images)} pictures for {wanted} {PLACE} placeholders; make them as many"
        raise FaultError(reason, "image_mismatch")
    waiting = iter(images)
    messages = []
    for role, text in texts:
        if role != "user" or not images:
            messages.append(Message(role, (TextPart(text),)))  # type: ignore[arg-type]
            continue
        parts: list[Part] = []
        pieces = text.split(PLACE)
        for i, piece in enumerate(pieces):
            if i:
                parts.append(ImagePart(next(waiting)))
                piece = piece.removeprefix("\n")
            if i < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                parts.append(TextPart(piece))
        messages.append(Message("user", tuple(parts)))
    return messages


def captioned(row: Row, image: Any, caption: Any, used: Iterable[str], id: str) -> Record:
    """A record of one picture and what is said of it.

    Raises:
        FaultError: there is no caption, or no usable picture.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise FaultError(f"the caption is {caption!r}; write some text", "malformed")
    source = row.pictures.bind(image)
    asked = Message("user", (ImagePart(source), TextPart(CAPTION_QUESTION)))
    answer = Message("assistant", (TextPart(caption.strip()),))
    return row.record([source], [asked, answer], used, id)
