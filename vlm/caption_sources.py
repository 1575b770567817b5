"""Where pictures to be captioned come from; every source is read as a stream.

- a folder, or a glob pattern: pictures below it, sorted; links to folders are not followed
- a list, or a .txt with a path a line: in its order
- .jsonl, .csv, .parquet: a column with paths, or with bytes as `datasets` writes them
- .tar: webdataset shards of key.jpg and, beside it, key.txt and key.json
- a Hugging Face dataset, of either kind
"""

import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from PIL import Image

from vlm.caption_items import IMAGE_COLUMNS, Item, file_item, row_item
from vlm.captioning import expand_paths, walk
from vlm.errors import ConfigError

Source = str | os.PathLike[str] | Iterable[Any]
_TABLES = (".csv", ".jsonl", ".parquet", ".tar", ".txt")


class Items:
    """The pictures of a source, read anew each time it is iterated; an iterator only once.

    Args:
        source: see the module; also a list of any of these.
        column: with the picture, in tables and datasets; found by itself by default.

    Raises:
        ConfigError: this is no source; RecordError while iterating: a bad line or table.
    """

    def __init__(self, source: Source, column: str | None = None) -> None:
        self._column = column
        self._parts: Iterable[Any] = (
            [source] if isinstance(source, str | os.PathLike) or _is_dataset(source) else source
        )
        if isinstance(source, bytes | Mapping) or not isinstance(self._parts, Iterable):
            hint = "name a split" if isinstance(source, Mapping) else "pass a folder, file or list"
            raise ConfigError(f"a {type(source).__name__} is no source of pictures; {hint}")

    def __iter__(self) -> Iterator[Item]:
        for number, part in enumerate(self._parts):
            yield from self._open(part, number)

    def count(self) -> int | None:
        """How many there are, if that can be told without reading the pictures."""
        if isinstance(self._parts, Iterator):
            return None
        total = 0
        for part in self._parts:
            number = self._count(part)
            if number is None:
                return None
            total += number
        return total

    def _open(self, part: Any, number: int) -> Iterator[Item]:
        if isinstance(part, Item):
            yield part
        elif _is_dataset(part):
            yield from _dataset_items(part, self._column)
        elif isinstance(part, bytes | Image.Image):
            yield Item(f"list#{number}", data=part, meta={"name": str(number), "directory": "list"})
        elif isinstance(part, Mapping):
            yield row_item(part, f"list#{number}", self._column, where=f"list[{number}]")
        elif isinstance(part, str | os.PathLike):
            yield from self._open_path(os.fspath(part))
        else:
            raise ConfigError(
                f"item {number} is a {type(part).__name__}; pass paths, bytes, PIL images or rows"
            )

    def _open_path(self, path: str) -> Iterator[Item]:
        if os.path.isdir(path):
            yield from map(file_item, walk(os.path.abspath(path)))
        elif (reader := _reader(path)) is not None:
            yield from reader(path, self._column)
        elif _is_pattern(path) and (found := _matches(path)):
            yield from itertools.chain.from_iterable(map(self._open_path, expand_paths(found)))
        else:  # a file, or what will get a row that says why it is none
            yield file_item(path)

    def _count(self, part: Any) -> int | None:
        if isinstance(part, str | os.PathLike):
            path = os.fspath(part)
            if os.path.isdir(path):
                return sum(1 for _ in walk(path))
            if _is_pattern(path) and (found := _matches(path)):
                numbers = list(map(self._count, expand_paths(found)))
                return None if None in numbers else sum(filter(None, numbers))
            if _reader(path) is not None:
                from vlm.caption_tables import count_rows

                return count_rows(path)
        elif _is_dataset(part):
            return len(part) if hasattr(part, "__len__") else None
        return 1


def _reader(path: str) -> Callable[[str, str | None], Iterator[Item]] | None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _TABLES or not os.path.isfile(path):
        return None
    from vlm import caption_tables as tables

    return {
        ".csv": tables.csv_items,
        ".jsonl": tables.jsonl_items,
        ".parquet": tables.parquet_items,
        ".tar": tables.tar_items,
        ".txt": tables.text_items,
    }[suffix]


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not os.path.lexists(path)


def _matches(pattern: str) -> list[str]:
    """What a pattern stands for, sorted.

    ``**`` is walked here: `glob` follows links, and of two that lead back it sees no end.
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    at = parts.index("**")
    rest = os.sep.join(parts[at + 1 :]) or "*"
    found: set[str] = set()
    for top in glob.glob(os.sep.join([*parts[:at], ""])) if at else [os.curdir]:
        for folder, subfolders, _ in os.walk(top):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found.update(_matches(os.path.join(glob.escape(folder), rest)))
    return sorted(path for path in found if not (os.path.islink(path) and os.path.isdir(path)))


def _is_dataset(source: Any) -> bool:
    return type(source).__module__.startswith("datasets.") and hasattr(source, "features")


def _dataset_items(rows: Any, column: str | None) -> Iterator[Item]:
    """Rows of a Hugging Face dataset; pictures are taken encoded, so that the gate sees bytes."""
    import datasets

    features = rows.features or {}
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    if column is None and images:
        column = images[0]
    if column in images:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if column is None and features and not set(IMAGE_COLUMNS) & set(features):
        raise ConfigError(
            f"the dataset has no image column, only {', '.join(features)}; name the one with paths"
        )
    info = [str(part) for part in (rows.info.dataset_name, rows.split) if part]
    title = "-".join(info) or "dataset"
    for number, row in enumerate(rows):
        yield row_item(row, f"{title}#{number}", column, where=f"{title} row {number}")
