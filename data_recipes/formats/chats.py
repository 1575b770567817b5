"""``messages``: our own records, TRL and Hugging Face rows, and OpenAI's requests.

    {"id": "1", "images": ["a.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."}]}

    {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}, ...]}

Batch lines of OpenAI have the messages under ``body`` and the id as ``custom_id``. Sources:
platform.openai.com/docs/guides/vision-fine-tuning; huggingface.co/docs/trl/dataset_formats.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.pictures import Pictures, as_list
from data_recipes.formats.row import PLACE, Row, place, role_of
from vlm.messages import RECORD_KEYS, ImagePart, Message, Part, Record, TextPart
from vlm.record_files import row_record, without_nulls


def is_record(raw: Mapping[str, Any]) -> bool:
    """A record of `vlm.messages.Record`, of JSONL or Parquet."""
    known = isinstance(raw.get("id"), str) and all(key in RECORD_KEYS for key in raw)
    return known and "messages" in raw and not is_openai(raw)


def is_openai(raw: Mapping[str, Any]) -> bool:
    """Some part is an ``image_url``, or the messages are a request's body."""
    body = raw.get("body")
    if isinstance(body, Mapping):
        return isinstance(body.get("messages"), list)
    return any(part.get("type") == "image_url" for part in _parts(raw.get("messages")))


def is_trl(raw: Mapping[str, Any]) -> bool:
    """The other rows with ``messages``."""
    return isinstance(raw.get("messages"), list)


def from_record(row: Row) -> Record:
    """A record as it is, its pictures' paths checked."""
    images = row.pictures.all(as_list(row.raw.get("images")))
    return row_record({**row.raw, "images": list(images)}, None, row.id)


def from_openai(row: Row) -> Record:
    """Pictures stand where their parts stand; what else a request says is kept under meta."""
    body = row.raw.get("body")
    messages = body["messages"] if isinstance(body, Mapping) else row.raw["messages"]
    images: list[str | bytes] = []
    found = []
    for i, message in enumerate(messages, 1):
        role, content = _role_content(message, f"message {i}")
        found.append(Message(role, tuple(_openai_parts(content, row.pictures, images))))
    used = ("messages", "custom_id", "body") if body is None else ("custom_id", "body")
    record = row.record(images, found, used, row.name("id", "custom_id"))
    if isinstance(body, Mapping) and (rest := {k: v for k, v in body.items() if k != "messages"}):
        record = Record(**{**vars(record), "meta": {**record.meta, "body": rest}})
    return record


def from_trl(row: Row) -> Record:
    """Pictures of ``images`` for the image parts in order.

    If no part and no text has a place for them, they stand before the first user's text, as
    TRL itself puts them.
    """
    images = row.pictures.all(as_list(row.raw.get("images", row.raw.get("image"))))
    used = ("messages", "images" if "images" in row.raw else "image")
    turns = [_role_content(m, f"message {i}") for i, m in enumerate(row.raw["messages"], 1)]
    if all(isinstance(content, str) for _, content in turns):
        has_place = any(PLACE in content for role, content in turns if role == "user")
        if images and not has_place:
            first = next((i for i, (role, _) in enumerate(turns) if role == "user"), 0)
            turns[first] = (turns[first][0], PLACE * len(images) + turns[first][1])
        return row.record(images, place(turns, images), used)
    waiting = list(images)
    found = [Message(role, tuple(_trl_parts(content, waiting))) for role, content in turns]
    wanted = sum(len(message.images) for message in found)
    if waiting or wanted != len(images):
        reason = f"{len(images)} images but {wanted} image parts; make them as many"
        raise FaultError(reason, "image_mismatch")
    return row.record(images, found, used)


def _parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, Mapping):
                yield part


def _role_content(message: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(message, Mapping):
        raise FaultError(f"{where} is a {type(message).__name__}, no mapping", "malformed")
    message = without_nulls(dict(message))
    if left := sorted(set(message) - {"role", "content", "name"}):
        raise FaultError(f"{where}: {', '.join(left)} cannot be expressed here", "malformed")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise FaultError(f"{where}: content is a {type(content).__name__}", "malformed")
    return role_of(message.get("role"), where), content


def _openai_parts(
    content: str | list[Any], pictures: Pictures, images: list[str | bytes]
) -> Iterator[Part]:
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield TextPart(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            images.append(pictures.bind(url.get("url") if isinstance(url, Mapping) else url))
            yield ImagePart(images[-1])
        else:
            raise FaultError(f"unknown part {str(part)[:60]}; use text or image_url", "malformed")


def _trl_parts(content: str | list[Any], waiting: list[str | bytes]) -> Iterator[Part]:
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield TextPart(part["text"])
        elif kind == "image" and set(part) == {"type"}:
            if not waiting:
                raise FaultError(
                    "more image parts than images; make them as many", "image_mismatch"
                )
            yield ImagePart(waiting.pop(0))
        else:
            raise FaultError(f"unknown part {str(part)[:60]}; use text or image", "malformed")
