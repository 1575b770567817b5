"""Rows of Parquet files and of Hugging Face data sets, pictures as bytes, never decoded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.text_files import Found
from vlm.errors import ConfigError, RecordError

HUB = "hf://"
_ROWS = 16  # in memory at a time: each may hold several pictures


def parquet_rows(path: Path) -> Iterator[Found]:
    """Rows in the file's order.

    Raises:
        FaultError: ``truncated``: it is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for raw in batch.to_pylist():
                    yield Found(f"{path}, row {number}", raw)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        reason = f"no whole Parquet file, {number} rows read ({error}); copy it anew"
        raise FaultError(reason, "truncated") from error


def is_dataset(source: Any) -> bool:
    """Something that `datasets` made: of one split or of several, map-style or streaming."""
    return type(source).__module__.startswith("datasets.")


def is_saved(folder: Path) -> bool:
    """What `save_to_disk` wrote."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path, split: str | None) -> Iterator[Found]:
    """Rows of a folder of `save_to_disk`."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(f"{folder}: no whole data set of save_to_disk ({error})") from error
    yield from dataset_rows(found, str(folder), split)


def hub_rows(name: str, split: str | None) -> Iterator[Found]:
    """Rows of a data set of the hub, streamed; ``hf://owner/name`` or ``.../config``.

    Raises:
        RecordError: the hub is not reached, or has no such data set.
    """
    import datasets

    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, config = rest.partition("/")
    try:
        found = datasets.load_dataset(
            f"{owner}/{repository}".rstrip("/"), config or None, split=split, streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(
            f"{name}: cannot be opened ({reason}); without a network, write it where there is "
            "one by datasets.load_dataset(...).save_to_disk(FOLDER), and give that folder"
        ) from error
    yield from dataset_rows(found, name, split)


def dataset_rows(found: Any, title: str, split: str | None) -> Iterator[Found]:
    """Rows of a data set in memory, on disk or streaming.

    Raises:
        ConfigError: it has several splits and none is chosen.
    """
    if isinstance(found, dict):
        if split is None and len(found) == 1:
            (split,) = found
        if split not in found:
            raise ConfigError(f"{title} has the splits {', '.join(found)}; choose by --split")
        found = found[split]
    if hasattr(found, "decode"):  # streaming
        # without known features nothing would be decoded, and `decode` refuses
        rows: Iterator[Any] = iter(found.decode(False) if found.features else found)
    else:
        tables = found.with_format("arrow").iter(batch_size=_ROWS)
        rows = (row for table in tables for row in table.to_pylist())
    for number, raw in enumerate(rows):
        yield Found(f"{title}, row {number}", raw)
