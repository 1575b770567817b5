"""Rows of JSON, JSONL, CSV and TSV files, gzipped or not, one at a time.

A JSON list of any length is streamed. COCO's file of captions has its pictures' names in
memory (one string a picture), its annotations are streamed.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson

from data_recipes.formats.captions import COCO
from data_recipes.formats.faults import Fault, FaultError, Report
from data_recipes.formats.json_list import list_items
from vlm.errors import RecordError

_BOMS = {b"\xff\xfe": "UTF-16, little endian", b"\xfe\xff": "UTF-16, big endian"}
_RECODE = "save it as UTF-8, for example by `iconv -f ENCODING -t UTF-8`"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_FIELD = 2**24


@dataclass(frozen=True)
class Found:
    """A row, where it lies, and its line if it has one."""

    where: str
    raw: Any
    line: int | None = None


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is gzipped, from behind a UTF-8 mark.

    Raises:
        RecordError: it cannot be read, is UTF-16, or ends too early.
    """
    try:
        with path.open("rb") as plain:
            is_packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if is_packed else plain
            mark = file.read(3)
            for bom, name in _BOMS.items():
                if mark.startswith(bom):
                    reason = f"bytes {bom.hex(' ')} at byte 0 say {name}; {_RECODE}"
                    raise RecordError(f"{path}: {reason}")
            file.seek(3 if mark == b"\xef\xbb\xbf" else 0)
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FaultError(
            f"the gzip file is damaged ({error}); copy it anew", "truncated"
        ) from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error})") from error


def json_rows(path: Path, report: Report) -> Iterator[Found]:
    """Rows of a JSON list, of lines, or of COCO's object, whichever the file holds."""
    with open_bytes(path) as file:
        first = file.readline(1 << 20)
        while first and not first.strip():
            first = file.readline(1 << 20)
    start = first.lstrip()[:1]
    if start == b"[":
        yield from _list_rows(path, report)
    elif start == b"{" and (path.suffix == ".json" or ".json." in path.name):
        yield from _line_rows(path, report) if _is_row(first) else _coco_rows(path)
    else:
        yield from _line_rows(path, report)


def _is_row(line: bytes) -> bool:
    try:
        found = json.loads(line)
    except ValueError:
        return False
    return not {"images", "annotations"} <= set(found)


def text_lines(path: Path, report: Report) -> Iterator[tuple[int, str]]:
    """Numbered lines; one that is not UTF-8 is reported and passed over."""
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                at = error.start
                reason = (
                    f"not UTF-8: byte {at + 1} of the line is {raw[at]:#04x} (latin-1?); {_RECODE}"
                )
                report(Fault(f"{path}, line {number}", "encoding", reason, number))


def _line_rows(path: Path, report: Report) -> Iterator[Found]:
    for number, line in text_lines(path, report):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield Found(where, json.loads(line), number)
        except ValueError as error:
            report(Fault(where, "malformed", f"not JSON ({error})", number))
        except RecursionError:
            report(Fault(where, "malformed", "its JSON is nested too deeply", number))


def _list_rows(path: Path, report: Report) -> Iterator[Found]:
    number = 0
    try:
        with open_bytes(path) as file:
            for number, raw in enumerate(list_items(file), start=1):
                yield Found(f"{path}, entry {number}", raw)
    except FaultError as error:
        if error.line is None:
            raise
        what, way = "not JSON", "what follows is not read"
        if error.code == "encoding":
            what, way = "not UTF-8", _RECODE
        where = f"{path}, after entry {number}"
        report(Fault(where, error.code, f"{what}: {error}; {way}", error.line))


def _coco_parser(path: Path) -> Any:
    """`ijson`, in the variant that keeps half of a surrogate pair, if the file has any."""
    end = b""
    with open_bytes(path) as file:
        while data := file.read(2**20):
            if _SURROGATE.search(end + data):
                return ijson.get_backend("python")
            end = data[-3:]
    return ijson


def _items(parser: Any, file: BinaryIO, prefix: str) -> Iterator[Any]:
    """Values as `json` has them: ijson's own floats would refuse integers over 64 bits."""
    return map(_with_floats, parser.items(file, prefix))


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_floats(each) for each in value]
    return float(value) if isinstance(value, Decimal) else value


def _coco_rows(path: Path) -> Iterator[Found]:
    parser = _coco_parser(path)
    try:
        with open_bytes(path) as file:
            names = {image["id"]: image["file_name"] for image in ijson.items(file, "images.item")}
        if not names:
            with open_bytes(path) as file:
                keys = [
                    value for at, kind, value in ijson.parse(file) if (at, kind) == ("", "map_key")
                ]
            raise RecordError(
                f"{path}, line 1: unknown shape: one object with the keys {', '.join(keys)}; "
                "COCO captions have images and annotations, other formats are lists or lines"
            )
        with open_bytes(path) as file:
            for number, raw in enumerate(_items(parser, file, "annotations.item"), 1):
                where = f"{path}, annotation {number}"
                name = names.get(raw.get("image_id"))
                yield Found(where, {COCO: name, **raw} if isinstance(raw, Mapping) else raw)
    except (ijson.JSONError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(
            f"{path}: no whole file of COCO captions ({reason}); copy it anew"
        ) from error


def table_rows(path: Path, report: Report) -> Iterator[Found]:
    """Rows of CSV or TSV under a line of column names; others are reported."""
    name = path.name.removesuffix(".gz")
    csv.field_size_limit(_MAX_FIELD)
    lines = (line for _, line in text_lines(path, report))
    reader = csv.DictReader(lines, delimiter="\t" if name.endswith(".tsv") else ",")
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            report(Fault(where, "malformed", f"no CSV ({error})", reader.line_num))
            return
        if row is None:
            return
        if None in row or None in row.values():
            wanted = len(reader.fieldnames or ())
            reason = f"not the {wanted} columns of the first line; quote commas and line breaks"
            report(Fault(where, "malformed", reason, reader.line_num))
            continue
        yield Found(where, row, reader.line_num)
