"""One picture to be captioned: a stable name, its bytes when they are wanted, words about it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlm.errors import ImageError, RecordError
from vlm.image_bytes import read_path
from vlm.images import DEFAULT_LIMITS

IMAGE_COLUMNS = ("image", "images", "image_path", "path", "file_name", "file", "filename", "img")
_PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class Item:
    """A picture of some source.

    Args:
        name: the same in every run: an absolute path, ``file#row`` or ``shard.tar#key``.
        path: of the picture's own file; None where it has none.
        data: encoded bytes or a picture in memory; None for a file, which is read on `load`.
        meta: words for prompts: ``name``, ``directory`` and the source's text columns.
        error: why the source could not give the picture.
    """

    name: str
    path: str | None = None
    data: bytes | Image.Image | None = None
    meta: Mapping[str, str] = field(default_factory=dict)
    error: ImageError | None = None

    def load(self) -> bytes | Image.Image:
        """What the image gate takes; a file is read now.

        Raises:
            ImageError: as `vlm.images.load_image` for a path.
        """
        if self.error is not None:
            raise self.error
        if self.data is not None:
            return self.data
        if self.path is None:
            raise ImageError(f"{self.name} has no picture; fill its column", "missing")
        return read_path(self.path, DEFAULT_LIMITS.max_bytes)


def file_item(path: str, meta: Mapping[str, str] | None = None) -> Item:
    """A picture file by its absolute path; addresses pass through, for the gate to refuse."""
    top = path if "://" in path[:16] or path.startswith("data:") else os.path.abspath(path)
    return Item(top, top, meta={**(meta or {}), **words_of(top)})


def row_item(
    row: Mapping[str, Any], name: str, column: str | None = None, folder: str = "", where: str = ""
) -> Item:
    """A picture by a row of a table.

    Args:
        row: columns and values; a picture is a path, bytes, ``{"bytes", "path"}`` or PIL's.
        name: of the item where the picture has no path of its own.
        column: with the picture; by default the first of `IMAGE_COLUMNS` that is there.
        folder: that relative paths start from.
        where: file and line, for errors.

    Raises:
        RecordError: no such column, or no picture in it; names line and columns.
    """
    column = column or next((each for each in IMAGE_COLUMNS if each in row), None)
    if column is None or column not in row:
        raise RecordError(
            f"{where or name} has no column {column or ' or '.join(IMAGE_COLUMNS[:4])!r}, only "
            f"{', '.join(map(str, row)) or 'nothing'}; name the picture's column (--column)"
        )
    value, meta = row[column], texts(row, column)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        path = os.fspath(value)
        if path.startswith("data:"):
            return Item(name, path, meta={**meta, **row_words(name)})
        return file_item(path if "://" in path[:16] else os.path.join(folder, path), meta)
    meta = {**meta, **row_words(name)}
    if isinstance(value, bytes | bytearray | Image.Image):
        return Item(name, data=value if isinstance(value, Image.Image) else bytes(value), meta=meta)
    if value is None or value == "":
        return Item(name, meta=meta)
    raise RecordError(
        f"{where or name}: column {column!r} holds {type(value).__name__} {str(value)[:40]!r}, no "
        f"path and no bytes; columns: {', '.join(map(str, row))}"
    )


def texts(row: Mapping[str, Any], but: str = "") -> dict[str, str]:
    """The columns that are text, numbers or lists of them, as text."""
    found: dict[str, str] = {}
    for key, value in row.items():
        if key == but:
            continue
        if isinstance(value, _PLAIN):
            found[str(key)] = str(value)
        elif isinstance(value, list | tuple) and all(isinstance(each, _PLAIN) for each in value):
            found[str(key)] = ", ".join(map(str, value))
    return found


def words_of(path: str) -> dict[str, str]:
    """``name``: of the file, without its suffix; ``directory``: the last part of its folder."""
    folder, last = os.path.split(path)
    return {"name": os.path.splitext(last)[0], "directory": os.path.basename(folder)}


def row_words(name: str) -> dict[str, str]:
    """The same for ``file#row``: the row or the key's last part, and the file's name."""
    top, _, key = name.rpartition("#")
    return {"name": os.path.basename(key), "directory": os.path.basename(top)}
