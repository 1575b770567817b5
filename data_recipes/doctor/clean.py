"""A clean copy: records.jsonl with pictures referenced where they are."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm.messages import Record, TextPart

RECORDS = "records.jsonl"
_INSIDE = "images"  # of pictures that came inside a table and have no file


def write_clean(records: Iterable[Record], folder: Path) -> int:
    """Write records, each picture's path relative to `folder`; return how many.

    The file appears whole or not at all. Pictures that are bytes become files in
    ``images/``, named by their content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{RECORDS}.part"
    num = 0
    with part.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(_raw(record, folder), ensure_ascii=False) + "\n")
            num += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / RECORDS)
    return num


def _raw(record: Record, folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = {"id": record.id}
    if record.images:
        raw["images"] = [_place(source, folder) for source in record.images]
    if record.messages:
        raw["messages"] = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in record.messages
        ]
    for key in ("source", "license", "meta"):
        if value := getattr(record, key):
            raw[key] = value
    return raw


def _place(source: str | bytes, folder: Path) -> str:
    if isinstance(source, str):
        return os.path.relpath(source, folder.resolve())
    place = folder / _INSIDE / hashlib.sha256(source).hexdigest()
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        part = place.with_name(place.name + ".part")
        part.write_bytes(source)
        os.replace(part, place)
    return place.relative_to(folder).as_posix()
