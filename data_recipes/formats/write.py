"""Write records as JSONL, as Parquet with the pictures inside, or as a LLaVA file.

Each file appears whole or not at all. Pictures that are bytes become files in ``images/``,
named by their content; other pictures stay where they are, and are named by paths relative
to the file, or lie inside the Parquet file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_recipes.formats.row import PLACE
from vlm.errors import ImageError, RecordError
from vlm.image_bytes import read_path, sniff
from vlm.images import DEFAULT_LIMITS
from vlm.messages import Message, Record, TextPart

JSONL, PARQUET, LLAVA = "records.jsonl", "records.parquet", "llava.json"
_IMAGES = "images"
# Of a row group, which is what a random access to one record reads. Small ones make a file's
# footer large: 32 rows in each would take 300 MiB of memory for a million records.
_ROWS, _BYTES = 256, 4 * 2**20


def write_jsonl(records: Iterable[Record], folder: Path | str) -> int:
    """Write ``folder/records.jsonl``; return the number of records.

    Raises:
        RecordError: a picture in memory is none, or the folder cannot be written.
    """
    folder = Path(folder)
    with _whole(folder / JSONL, "w") as file:
        number = 0
        for record in records:
            file.write(_line({**raw_record(record), **_images(record, folder)}) + "\n")
            number += 1
    return number


def write_llava(records: Iterable[Record], folder: Path | str) -> int:
    """Write ``folder/llava.json``, a list; return the number of records.

    LLaVA has no system message, source, licence or meta: they are kept under the keys
    ``system``, ``source``, ``license`` and ``meta``, which LLaVA's code does not read and
    `data_recipes.formats.read` does.

    Raises:
        RecordError: also when a text has ``<image>`` in it, which LLaVA would take for a picture.
    """
    folder = Path(folder)
    with _whole(folder / LLAVA, "w") as file:
        number = 0
        for record in records:
            file.write("[\n" if number == 0 else ",\n")
            file.write(_line(llava_entry(record, _images(record, folder).get("images", []))))
            number += 1
        file.write("\n]\n" if number else "[]\n")
    return number


def write_parquet(records: Iterable[Record], folder: Path | str) -> int:
    """Write ``folder/records.parquet``, pictures inside; return the number of records.

    `datasets` reads ``images`` as a list of pictures; ``messages`` and ``meta`` are JSON.

    Raises:
        RecordError: a picture cannot be read, or the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    texts = ("id", "messages", "source", "license", "meta")
    features = Features({"images": List(Image()), **{key: Value("string") for key in texts}})
    schema = features.arrow_schema
    number = 0
    rows: list[Mapping[str, Any]] = []
    with _whole(Path(folder) / PARQUET, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        size = 0

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

        for record in records:
            rows.append(_row(record))
            number += 1
            size += sum(len(image["bytes"]) for image in rows[-1]["images"])
            if len(rows) == _ROWS or size >= _BYTES:
                flush()
                size = 0
        if rows:
            flush()
    return number


# The names of `vlm data convert --format`.
WRITERS: dict[str, tuple[Callable[[Iterable[Record], Path], int], str]] = {
    "jsonl": (write_jsonl, JSONL),
    "parquet": (write_parquet, PARQUET),
    "llava": (write_llava, LLAVA),
}


def raw_record(record: Record) -> dict[str, Any]:
    """A record as JSON has it, without its pictures' names."""
    raw: dict[str, Any] = {"id": record.id}
    if record.messages:
        raw["messages"] = [_raw_message(message) for message in record.messages]
    for key in ("source", "license", "meta"):
        if value := getattr(record, key):
            raw[key] = value
    return raw


def llava_entry(record: Record, images: list[str]) -> dict[str, Any]:
    """An entry of a LLaVA file; a line break stands between a picture and a text.

    Args:
        record: whose texts are taken.
        images: its pictures' names in the file.

    Raises:
        RecordError: a text has the placeholder in it.
    """
    entry: dict[str, Any] = {"id": record.id}
    if images:
        entry["image"] = images[0] if len(images) == 1 else images
    turns = list(record.messages)
    if turns and turns[0].role == "system":
        entry["system"] = turns.pop(0).text
    entry["conversations"] = [
        {
            "from": "human" if turn.role == "user" else "gpt",
            "value": _value(turn, bool(images), record.id),
        }
        for turn in turns
    ]
    for key in ("source", "license", "meta"):
        if value := getattr(record, key):
            entry[key] = value
    return entry


def _value(message: Message, has_images: bool, id: str) -> str:
    pieces: list[str] = []
    before_is_text = False
    for part in message.content:
        is_text = isinstance(part, TextPart)
        text = part.text if isinstance(part, TextPart) else PLACE
        if is_text and has_images and message.role == "user" and PLACE in text:
            raise RecordError(f"record {id!r}: the text has {PLACE} in it; reword it for LLaVA")
        if is_text and before_is_text:
            pieces[-1] += text
        elif text:
            pieces.append(text)
            before_is_text = is_text
    return "\n".join(pieces)


def _raw_message(message: Message) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts = [
        {"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": "image"}
        for p in message.content
    ]
    return {"role": message.role, "content": parts}


def _row(record: Record) -> Mapping[str, Any]:
    raw = raw_record(record)
    images = []
    for source in record.images:
        try:
            data = (
                read_path(source, DEFAULT_LIMITS.max_bytes) if isinstance(source, str) else source
            )
        except ImageError as error:
            raise RecordError(f"record {record.id!r}: {error}") from error
        name = os.path.basename(source) if isinstance(source, str) else None
        images.append({"bytes": data, "path": name})
    texts: dict[str, Any] = {key: _line(raw[key]) for key in ("messages", "meta") if key in raw}
    return {**raw, **texts, "images": images}


def _images(record: Record, folder: Path) -> dict[str, list[str]]:
    names = [_placed(source, folder, record.id) for source in record.images]
    return {"images": names} if names else {}


def _placed(source: str | bytes, folder: Path, id: str) -> str:
    if isinstance(source, str):
        return os.path.relpath(source, folder.resolve())
    try:
        suffix = sniff(source, f"record {id!r}: a picture").lower()
    except ImageError as error:
        raise RecordError(str(error)) from error
    name = f"{hashlib.sha256(source).hexdigest()}.{suffix.replace('jpeg', 'jpg')}"
    place = folder / _IMAGES / name
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        part = place.with_name(f"{name}.part")
        part.write_bytes(source)
        os.replace(part, place)
    return f"{_IMAGES}/{name}"


def _line(raw: Any) -> str:
    return json.dumps(raw, ensure_ascii=False, default=str)


@contextmanager
def _whole(path: Path, mode: str) -> Iterator[IO[Any]]:
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written ({error}); choose another folder") from error
