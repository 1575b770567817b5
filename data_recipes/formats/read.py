"""Read records from whatever people have: which container, which shape, row by row."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.formats import captions, chats, conversations, questions
from data_recipes.formats.faults import Fault, FaultError, Report, refuse
from data_recipes.formats.folders import SIDECAR, folder_rows, from_sidecar
from data_recipes.formats.pictures import Pictures
from data_recipes.formats.row import Row
from data_recipes.formats.shards import samples
from data_recipes.formats.tables import (
    HUB,
    dataset_rows,
    hub_rows,
    is_dataset,
    is_saved,
    parquet_rows,
    saved_rows,
)
from data_recipes.formats.text_files import Found, json_rows, table_rows
from vlm.errors import ConfigError, RecordError
from vlm.messages import Record, nearest

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_JSON = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz")
_SHARDS = (".tar", ".tar.gz", ".tgz", ".zip")
_KNOWN = (*_JSON, *_TABLES, *_SHARDS, ".parquet")
_INDEX = ("records.jsonl", "records.parquet", "metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Format:
    """A shape of rows.

    Attributes:
        name: of `read(format=...)`.
        about: one line.
        matches: whether a row looks like it.
        convert: one row to a record; a pure function.
    """

    name: str
    about: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Row], Record]


_ALL = (
    Format("record", "this project's records", chats.is_record, chats.from_record),
    Format(
        "openai", "OpenAI messages with image_url, batch lines", chats.is_openai, chats.from_openai
    ),
    Format("trl", "images and messages of TRL and Hugging Face", chats.is_trl, chats.from_trl),
    Format(
        "llava",
        "LLaVA's conversations and image",
        conversations.is_llava,
        conversations.convert,
    ),
    Format(
        "sharegpt",
        "ShareGPT's conversations, images and system",
        conversations.is_sharegpt,
        conversations.convert,
    ),
    Format(
        "cauldron",
        "images and texts of The Cauldron and FineVision",
        questions.is_cauldron,
        questions.convert,
    ),
    Format("coco", "COCO captions", captions.is_coco, captions.from_coco),
    Format(
        "webdataset",
        "tar or zip shards of key.jpg, key.txt, key.json, key.cls",
        captions.is_sample,
        captions.from_sample,
    ),
    Format(
        "folder",
        "a folder of pictures with a .txt beside each",
        lambda raw: SIDECAR in raw,
        from_sidecar,
    ),
    Format(
        "captions",
        "rows with columns image and caption",
        captions.is_captioned,
        captions.from_columns,
    ),
)
# By name; a row is of the first that matches.
FORMATS: dict[str, Format] = {each.name: each for each in _ALL}


def read(
    path: Path | str | Any,
    *,
    format: str | None = None,
    images: Path | str | None = None,
    split: str | None = None,
    faults: Report | None = None,
    fetch: Callable[[str], bytes] | None = None,
) -> Iterator[Record]:
    """Stream the records of any known shape; memory does not grow with their number.

    Args:
        path: a file, a folder, a pattern (``part-*.jsonl``, ``{00000..00012}.tar``),
            ``hf://owner/name``, or a data set of `datasets`, map-style or streaming.
        format: a key of `FORMATS`; found row by row by default.
        images: another folder in which pictures may lie.
        split: of a data set that has several.
        faults: told of each row that cannot be used, which is then passed over; without it
            the first one raises.
        fetch: gives the bytes of a picture by its URL, such as `vlm.remote.fetch_picture`;
            without it a URL is a fault.

    Raises:
        ConfigError: at once: no such format. While iterating: a split must be chosen.
        RecordError: while iterating: nothing can be read there, or a row cannot be used; it
            names file, line and reason.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}{nearest(format, FORMATS)}")

    def bind(folder: Path) -> Pictures:
        return Pictures(folder, images, fetch)

    return _read(path, FORMATS.get(format or ""), bind, split, faults or refuse)


def _read(
    path: Any,
    format: Format | None,
    bind: Callable[[Path], Pictures],
    split: str | None,
    report: Report,
) -> Iterator[Record]:
    if is_dataset(path) or str(path).startswith(HUB):
        is_open = is_dataset(path)
        rows = dataset_rows(path, "dataset", split) if is_open else hub_rows(str(path), split)
        yield from _records(rows, format, "row", bind(Path.cwd()), report)
        return
    for each in files(path):
        pictures = bind(each if each.is_dir() else each.parent)
        name = each.name.partition(".")[0]
        try:
            rows = _rows(each, pictures, split, report)
            yield from _records(rows, format, name, pictures, report)
        except FaultError as error:
            report(Fault(str(each), error.code, str(error)))


def files(path: Path | str) -> Iterator[Path]:
    """The files and folders that a path or pattern stands for, in order.

    Raises:
        RecordError: there are none.
    """
    if os.path.lexists(path):
        yield from _in_folder(Path(path))
        return
    number = 0
    for name in braces(str(path)):
        for found in sorted(glob.glob(name)) if glob.has_magic(name) else [name]:
            if not os.path.exists(found):
                raise RecordError(
                    f"no data file {found}; give a file, a folder or a pattern, or {HUB}OWNER/NAME"
                )
            number += 1
            yield from _in_folder(Path(found))
    if not number:
        raise RecordError(f"no data file {path}: the pattern fits none; check it")


def braces(pattern: str) -> Iterator[str]:
    """Names of a pattern of webdataset.

    >>> list(braces("{a,b}-{08..10}.tar"))[1:4]
    ['a-09.tar', 'a-10.tar', 'b-08.tar']
    """
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    inside = found.group(1)
    if ends := _RANGE.fullmatch(inside):
        first, last = (int(end) for end in ends.groups())
        if not 0 <= last - first < _MOST_FILES:
            raise RecordError(f"pattern {pattern!r}: {inside} is no range of files; correct it")
        width = len(ends.group(1))
        choices = (f"{number:0{width}}" for number in range(first, last + 1))
    else:
        choices = (each for each in inside.split(","))
    for choice in choices:
        yield from braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _in_folder(path: Path) -> Iterator[Path]:
    """The file of rows in a folder, or its shards; otherwise the path itself."""
    if not path.is_dir() or is_saved(path):
        yield path
        return
    index = next((path / name for name in _INDEX if (path / name).is_file()), None)
    shards = [each for suffix in (".parquet", ".tar") for each in sorted(path.glob(f"*{suffix}"))]
    yield from [index] if index else shards or [path]


def _rows(path: Path, pictures: Pictures, split: str | None, report: Report) -> Iterator[Found]:
    name = path.name.lower()
    if path.is_dir():
        return saved_rows(path, split) if is_saved(path) else folder_rows(path, pictures, report)
    if name.endswith(".parquet"):
        return parquet_rows(path)
    if name.endswith(_SHARDS):
        return samples(path, report)
    if name.endswith(_TABLES):
        return table_rows(path, report)
    if name.endswith(_JSON):
        return json_rows(path, report)
    raise RecordError(f"{path}: the name ends in none of {', '.join(_KNOWN)}; rename the file")


def _records(
    rows: Iterator[Found], format: Format | None, name: str, pictures: Pictures, report: Report
) -> Iterator[Record]:
    for index, found in enumerate(rows):
        try:
            record = _record(found, format, f"{name}-{index}", pictures)
        except RecordError as error:
            code = error.code if isinstance(error, FaultError) else "malformed"
            reason = str(error).removeprefix(f"{name}-{index}: ")
            report(Fault(found.where, code, reason, found.line))
            continue
        yield record


def _record(found: Found, format: Format | None, id: str, pictures: Pictures) -> Record:
    if not isinstance(found.raw, Mapping):
        kind = type(found.raw).__name__
        raise FaultError(f"a {kind}, no object; write one object a row", "malformed")
    raw = {key: value for key, value in found.raw.items() if value is not None}
    chosen = format or next((each for each in _ALL if each.matches(raw)), None)
    keys = ", ".join(map(str, raw)) or "none"
    if chosen is None:
        known = ", ".join(FORMATS)
        raise FaultError(f"unknown shape with the keys {keys}; known: {known}", "unknown_shape")
    if format is not None and not format.matches(raw):
        raise FaultError(f"not of the format {format.name}; its keys: {keys}", "unknown_shape")
    return chosen.convert(Row(raw, id, pictures))
