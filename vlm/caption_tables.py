"""Files that list or hold many pictures, row by row: text, JSONL, CSV, Parquet, tar shards.

A `RecordError` names file, line and what was found there. Relative paths start from the
file's own folder.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator
from typing import Any

from vlm.caption_items import IMAGE_COLUMNS, Item, file_item, row_item, row_words, texts
from vlm.captioning import SUFFIXES
from vlm.errors import ImageError, RecordError
from vlm.image_bytes import check_bytes
from vlm.images import DEFAULT_LIMITS

_ROWS = 16  # of a Parquet file in memory at a time
_MAX_TEXT_BYTES = 1 << 20  # of a .txt or .json in a shard


def text_items(path: str, column: str | None = None) -> Iterator[Item]:
    """A path a line; empty lines do not count."""
    folder = os.path.dirname(os.path.abspath(path))
    for _, line in _lines(path):
        if line.strip():
            name = line.rstrip("\r\n")
            yield file_item(name if "://" in name[:16] else os.path.join(folder, name))


def jsonl_items(path: str, column: str | None = None) -> Iterator[Item]:
    """An object a line."""
    top = os.path.abspath(path)
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecordError(f"{where} is no JSON ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise RecordError(f"{where} holds a {type(row).__name__}; write one object a line")
        yield row_item(row, f"{top}#{number}", column, os.path.dirname(top), where)


def csv_items(path: str, column: str | None = None) -> Iterator[Item]:
    """Rows under a line of column names."""
    top = os.path.abspath(path)
    reader = csv.DictReader(line for _, line in _lines(path))
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            clean = {key: value for key, value in row.items() if isinstance(key, str)}
            name = f"{top}#{reader.line_num}"
            yield row_item(clean, name, column, os.path.dirname(top), where)
    except csv.Error as error:
        raise RecordError(f"{path}:{reader.line_num} is no CSV ({error}); mend the line") from error


def parquet_items(path: str, column: str | None = None) -> Iterator[Item]:
    """Rows with paths, bytes, or structs of both as `datasets` writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    top = os.path.abspath(path)
    try:
        with pq.ParquetFile(path) as file:
            column = column or _image_column(file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    name = f"{top}#{number}"
                    where = f"{path} row {number}"
                    yield row_item(row, name, column, os.path.dirname(top), where)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path} is no readable Parquet file ({error}); write it anew") from error


def tar_items(path: str, column: str | None = None) -> Iterator[Item]:
    """A webdataset shard: files with one key are one picture and what is said of it.

    A shard that is cut off gives what is whole, and a last item with the error.
    """
    top = os.path.abspath(path)
    group: dict[str, bytes | ImageError] = {}
    key, found, suffixes = None, False, set[str]()
    try:
        with tarfile.open(path, "r|*") as file:
            for member in file:
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                stem, dot, suffix = name.partition(".")
                this = os.path.join(folder, stem)
                suffixes.add(dot + suffix)
                if this != key:
                    for item in _group_items(top, key or "", group):
                        found = True
                        yield item
                    key, group = this, {}
                group[dot + suffix] = _member(file, member, f"{top}#{member.name}")
        for item in _group_items(top, key or "", group):
            found = True
            yield item
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if not suffixes:
            raise RecordError(f"{path} is no readable tar file ({error}); copy it anew") from error
        text = f"{path} stops or is damaged after {key!r} ({error}); copy it anew"
        yield from _group_items(top, key or "", group)
        yield Item(f"{top}#", error=ImageError(" ".join(text.split()), "truncated"))
        return
    if not found:
        seen = ", ".join(sorted(suffixes)) or "nothing"
        raise RecordError(f"{path} holds no pictures (key.jpg, key.png, ...), only {seen}")


def count_rows(path: str) -> int | None:
    """Rows of a table; None for a tar file, which would have to be read."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".tar":
        return None
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError):
            return None
    number = sum(1 for _, line in _lines(path) if line.strip())
    return max(0, number - 1) if suffix == ".csv" else number


def _lines(path: str) -> Iterator[tuple[int, str]]:
    # What is no UTF-8 in a list of paths is a file name like any other.
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); check the path") from error


def _image_column(schema: Any) -> str | None:
    """By the feature types that `datasets` notes, else by name, else the one with bytes."""
    import pyarrow as pa

    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {key: kind.get("_type") for key, kind in noted.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError):
        kinds = {}
    by_type = [key for key, kind in kinds.items() if kind == "Image"]
    by_name = [key for key in IMAGE_COLUMNS if key in schema.names]
    by_bytes = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    return next(iter([*by_type, *by_name, *by_bytes]), None)


def _member(file: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes | ImageError:
    is_picture = os.path.splitext(member.name)[1].lower() in SUFFIXES
    limit = DEFAULT_LIMITS.max_bytes if is_picture else _MAX_TEXT_BYTES
    try:
        check_bytes(member.size, limit, name)
    except ImageError as error:
        return error
    stream = file.extractfile(member)
    return stream.read() if stream is not None else b""


def _group_items(top: str, key: str, group: dict[str, bytes | ImageError]) -> Iterator[Item]:
    pictures = [each for each in group if f".{each.rpartition('.')[2]}".lower() in SUFFIXES]
    meta: dict[str, str] = {}
    for suffix, data in group.items():
        if suffix not in (".txt", ".json") or isinstance(data, ImageError):
            continue
        text = io.TextIOWrapper(io.BytesIO(data), "utf-8", errors="replace").read()
        if suffix == ".txt":
            meta["txt"] = text.strip()
            continue
        try:
            row = json.loads(text)
        except ValueError:
            continue  # words for prompts that cannot be read are words that are missing
        meta.update(texts(row) if isinstance(row, dict) else {})
    for number, suffix in enumerate(pictures):
        data = group[suffix]
        name = f"{top}#{key}" if number == 0 else f"{top}#{key}{suffix}"
        words = {**meta, **row_words(name)}
        if isinstance(data, ImageError):
            yield Item(name, meta=words, error=data)
        else:
            yield Item(name, data=data, meta=words)
