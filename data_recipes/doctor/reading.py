"""Records of a JSONL file for the doctor: a bad line is told and passed over."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import RecordError
from vlm.messages import Record, parse_record

_REMOTE = ("http:/", "https:/", "ftp:/", "file:/", "s3:/", "gs:/")


@dataclass(frozen=True)
class LineFault:
    """A line that no record was made of."""

    where: str
    code: str
    reason: str


def jsonl(path: Path, images: Path | None = None) -> Callable[..., Iterator[Record]]:
    """A reader of a JSONL file.

    Args:
        path: of the file; picture paths are relative to its folder.
        images: another folder in which pictures may lie. A path that leaves both, by
            ``..``, as an absolute one or through a link, is a fault and is not opened.

    Raises:
        RecordError: the file is missing or cannot be read.
    """
    roots = [str(folder.resolve()) for folder in (path.parent, images) if folder is not None]
    if not path.is_file():
        raise RecordError(f"{path}: there is no such file; give a .jsonl file of records")

    def read(faults: Callable[[Any], None]) -> Iterator[Record]:
        try:
            opened = path.open("rb")
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error}); check its permissions") from error
        with opened as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                where = f"{path.name}, line {number}"
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8: byte {error.start + 1} is {raw[error.start]:#04x}"
                    faults(LineFault(where, "malformed", reason))
                    continue
                found = _record(line, path.parent, where, roots)
                if isinstance(found, Record):
                    yield found
                else:
                    faults(found)

    return read


def _record(line: str, folder: Path, where: str, roots: list[str]) -> Record | LineFault:
    try:
        record = parse_record(line, folder, where)
    except RecordError as error:
        return LineFault(where, "malformed", str(error).removeprefix(f"{where}: "))
    except RecursionError:
        return LineFault(where, "malformed", "its JSON is nested too deeply")
    except (ValueError, OSError, RuntimeError) as error:  # a NUL in a path, a link to itself
        return LineFault(where, "unreadable", f"a picture's path leads nowhere: {error}")
    for image in record.images:
        if isinstance(image, bytes):
            continue
        inside = next((root for root in roots if image.startswith(f"{root}/")), None)
        if inside is None:
            reason = f"{record.id!r}: {image} lies outside of the data's folder"
            return LineFault(where, "path_escape", reason)
        if image[len(inside) + 1 :].lower().startswith(_REMOTE):
            reason = f"{record.id!r}: {image[len(inside) + 1 :]} is a URL; download it first"
            return LineFault(where, "remote_url", reason)
    return record
