"""A picture and a text: tables, COCO captions, sidecar files and webdataset samples.

    image,caption                                  {"file_name": "a.jpg", "text": "A cat."}
    a.jpg,A cat.

    {"images": [{"id": 9, "file_name": "a.jpg"}],
     "annotations": [{"id": 1, "image_id": 9, "caption": "A cat."}]}

    000000000.jpg  000000000.txt  000000000.json   in a tar file, as img2dataset writes it

Sources: cocodataset.org/#format-data; github.com/rom1504/img2dataset;
github.com/webdataset/webdataset.
"""

import json
from collections.abc import Mapping
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.row import Row, captioned
from vlm.caption_items import IMAGE_COLUMNS
from vlm.captioning import SUFFIXES
from vlm.messages import ImagePart, Message, Record, TextPart

CAPTION_COLUMNS = ("caption", "text", "txt", "description", "alt_text", "title")
CLASS_QUESTION = "Which class does the image belong to?"
COCO, KEY = "coco_image", "__key__"  # what containers put into rows


def column(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The row's key that is the first of the names, whatever its case.

    >>> column({"Image": "a.jpg", "TEXT": "A cat."}, CAPTION_COLUMNS)
    'TEXT'
    """
    by_name = {str(key).strip().lower(): key for key in raw}
    return next((by_name[name] for name in names if name in by_name), None)


def is_captioned(raw: Mapping[str, Any]) -> bool:
    """There is a column for each."""
    return bool(column(raw, IMAGE_COLUMNS) and column(raw, CAPTION_COLUMNS))


def from_columns(row: Row) -> Record:
    """Columns are found by their usual names; others are kept under ``meta``."""
    image, text = column(row.raw, IMAGE_COLUMNS), column(row.raw, CAPTION_COLUMNS)
    if image is None or text is None:
        raise FaultError(
            f"no column for the {'picture' if image is None else 'caption'} among "
            f"{', '.join(map(str, row.raw))}; name them image and caption",
            "unknown_shape",
        )
    value = row.raw[image]
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return captioned(row, value, row.raw[text], (image, text), row.name())


def is_coco(raw: Mapping[str, Any]) -> bool:
    """An annotation joined with its picture's file name."""
    return COCO in raw


def from_coco(row: Row) -> Record:
    """One record a caption; its id is the annotation's, the picture's is kept."""
    return captioned(row, row.raw[COCO], row.raw.get("caption"), (COCO, "caption"), row.name())


def is_sample(raw: Mapping[str, Any]) -> bool:
    """A sample of a shard, by its key."""
    return KEY in raw


def from_sample(row: Row) -> Record:
    """The text is of ``.txt``, else the ``caption`` of ``.json``, else the class of ``.cls``."""
    raw = row.raw
    found = [key for key in raw if f".{key.rpartition('.')[2].lower()}" in SUFFIXES]
    if len(found) != 1:
        seen = ", ".join(key for key in raw if not key.startswith("__"))
        raise FaultError(f"{len(found)} pictures among {seen}; one is needed", "malformed")
    extra = _extra(raw.get("json"))
    text = raw.get("txt")
    if text is None and isinstance(extra, Mapping):
        name = column(extra, CAPTION_COLUMNS)
        text = extra[name] if name else None
    used = (*found, "txt", "json", KEY, "__url__", "__local_path__", "cls")
    plain = Row(
        {"meta": extra, **{k: v for k, v in raw.items() if k not in used}}, row.id, row.pictures
    )
    if text is None and "cls" in raw:
        source = row.pictures.bind(raw[found[0]])
        asked = Message("user", (ImagePart(source), TextPart(CLASS_QUESTION)))
        answer = Message("assistant", (TextPart(_text(raw["cls"])),))
        return plain.record([source], [asked, answer], (), raw[KEY])
    return captioned(plain, raw[found[0]], _text(text), (), raw[KEY])


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            reason = f"its text is not UTF-8: byte {error.start} is {value[error.start]:#04x}"
            raise FaultError(reason, "encoding") from error
    return str(value) if isinstance(value, int) else value


def _extra(value: Any) -> Any:
    if not isinstance(value, bytes | str):
        return value or {}
    try:
        found = json.loads(value)
    except ValueError as error:
        raise FaultError(f"its .json is not JSON ({error})", "malformed") from error
    return found if isinstance(found, Mapping) else {"json": found}
