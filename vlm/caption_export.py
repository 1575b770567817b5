"""Files made from a ledger: a text beside each picture, a CSV or a Parquet table.

Each is written under another name and then renamed, so that it is whole or not there. The
ledger stays the truth; any of them can be made again at any time.
"""

import csv as csv_files
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, RecordError
from vlm.image_bytes import shorten
from vlm.ledger_rows import name_key, read_rows

BESIDE = "beside"
_HELD = (".csv", ".jsonl", ".parquet", ".tar")
_COLUMNS = ("status", "code", "error", "finish_reason", "mean_logprob", "sha256", "copy_of")
_BATCH = 1000  # rows of a Parquet table in memory
_MOST_TOLD = 20
_MOST_READ = 1 << 16  # characters of a text that is compared


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        sidecars: text files that hold their caption now.
        kept: text files left alone, as they held another text.
        problems: the first text files that could not be written, and why.
    """

    sidecars: int = 0
    kept: int = 0
    problems: tuple[str, ...] = ()


def export_captions(
    ledger: str | os.PathLike[str],
    *,
    sidecar: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    parquet: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a ledger's captions in other forms; of each picture the last row counts.

    Args:
        ledger: of `vlm.caption_images`.
        sidecar: ``"beside"`` for ``a.txt`` beside ``a.jpg``, or a folder that mirrors the
            pictures' folders. Where two would share it, ``a.jpg.txt`` and ``a.png.txt``.
            Several prompts give ``a.KEY.txt`` each.
        csv: columns path, caption (and caption_KEY of several prompts), status, code,
            error, finish_reason, mean_logprob, sha256, copy_of.
        parquet: the same columns.
        overwrite: replace text files that hold another text; they are kept by default,
            unless it is an earlier caption of the picture in this ledger.

    Raises:
        ConfigError: ``"beside"`` for pictures that have no file of their own.
        RecordError: the ledger cannot be read, or a table cannot be written.
    """
    if sidecar is None and csv is None and parquet is None:
        return Exported()
    last = {name_key(row["path"]): offset for offset, row in read_rows(ledger)}
    earlier = set[bytes]()
    for offset, row in read_rows(ledger) if sidecar is not None else ():
        if last[name_key(row["path"])] != offset:
            earlier.update(_said(row["path"], text) for text in _texts(row))
    if csv is not None:
        _write_csv(Path(csv), ledger, last)
    if parquet is not None:
        _write_parquet(Path(parquet), ledger, last)
    if sidecar is None:
        return Exported()
    return _write_sidecars(sidecar, ledger, last, None if overwrite else earlier)


def _rows(ledger: str | os.PathLike[str], last: Mapping[bytes, int]) -> Iterator[dict[str, Any]]:
    for offset, row in read_rows(ledger):
        if last.get(name_key(row["path"])) == offset:
            yield row


def _texts(row: Mapping[str, Any]) -> list[str]:
    several = [each["text"] for each in (row.get("captions") or {}).values()]
    return several or ([] if row["caption"] is None else [row["caption"]])


def _said(name: str, text: str) -> bytes:
    return name_key(f"{name}\0{text}")


def _keys(row: Mapping[str, Any]) -> list[str]:
    return list(row["prompt"]) if isinstance(row["prompt"], dict) else []


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    captions = row.get("captions") or {}
    several = {f"caption_{key}": captions.get(key, {}).get("text") for key in _keys(row)}
    name = row["path"].encode("utf-8", "backslashreplace").decode()
    rest = {key: row.get(key) for key in _COLUMNS}
    return {"path": name, "caption": row["caption"], **several, **rest}


def _write_csv(path: Path, ledger: str | os.PathLike[str], last: Mapping[bytes, int]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer: csv_files.DictWriter[str] | None = None
            for row in map(_flat, _rows(ledger, last)):
                if writer is None:
                    writer = csv_files.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_parquet(path: Path, ledger: str | os.PathLike[str], last: Mapping[bytes, int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(_rows(ledger, last), None)
    names = ["path", "caption", *_COLUMNS] if first is None else list(_flat(first))
    kinds = {"mean_logprob": pa.float64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            batch: list[dict[str, Any]] = []
            for row in map(_flat, _rows(ledger, last)):
                batch.append(row)
                if len(batch) == _BATCH:
                    writer.write_table(pa.Table.from_pylist(batch, schema))
                    batch = []
            writer.write_table(pa.Table.from_pylist(batch, schema))
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RecordError:
    reason = error.strerror or str(error)
    return RecordError(f"{path} cannot be written ({reason}); make its folder, or room")


def _write_sidecars(
    where: str | os.PathLike[str],
    ledger: str | os.PathLike[str],
    last: Mapping[bytes, int],
    ours: Container[bytes] | None,
) -> Exported:
    beside = where == BESIDE
    folders = {_place(row["path"])[0] for row in _rows(ledger, last) if row["caption"] is not None}
    rooted = [folder for folder in folders if os.path.isabs(folder)]
    root = os.path.commonpath(rooted) if rooted else ""
    taken: Counter[bytes] = Counter()
    for row in _rows(ledger, last):
        taken.update(name_key(target) for target, _ in _targets(row, os.fspath(where), root))
    sidecars = kept = 0
    problems: list[str] = []
    for row in _rows(ledger, last):
        if row["caption"] is None:
            continue
        if beside and _held(row["path"]):
            raise ConfigError(
                f"{shorten(row['path'])} has no file of its own to write beside; give a folder"
            )
        targets = _targets(row, os.fspath(where), root)
        if any(taken[name_key(target)] > 1 for target, _ in targets):
            targets = _targets(row, os.fspath(where), root, whole=True)
        for target, text in targets:
            try:
                written = _write_text(target, f"{text}\n", row["path"], ours)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                problems.append(f"{shorten(target)} cannot be written ({reason})")
                continue
            sidecars += written
            kept += not written
    return Exported(sidecars, kept, tuple(problems[:_MOST_TOLD]))


def _held(name: str) -> bool:
    """Whether this names a row or a key in a file, and no file."""
    top, _, _ = name.rpartition("#")
    return bool(top) and (not os.path.isabs(name) or top.lower().endswith(_HELD))


def _place(name: str) -> tuple[str, str]:
    """Folder and file name of a picture; a table or shard counts as a folder."""
    if not _held(name):
        return os.path.split(name)
    top, _, key = name.rpartition("#")
    parts = [part for part in key.split("/") if part not in ("", ".", "..")]
    folder, base = os.path.split(top)
    return folder, os.path.join(base, *parts)


def _targets(
    row: Mapping[str, Any], where: str, root: str, whole: bool = False
) -> list[tuple[str, str | None]]:
    """Text files of a picture and what they hold."""
    folder, name = _place(row["path"])
    if where != BESIDE:
        below = os.path.relpath(folder, root) if os.path.isabs(folder) and root else folder
        folder = os.path.join(where, "" if below.startswith("..") else below)
    stem = name if whole or _held(row["path"]) else os.path.splitext(name)[0]
    top = os.path.join(folder, stem)
    captions = row.get("captions") or {}
    keys = _keys(row)
    if not keys:
        return [(f"{top}.txt", row["caption"])]
    return [(f"{top}.{key}.txt", captions.get(key, {}).get("text")) for key in keys]


def _write_text(target: str, text: str, name: str, ours: Container[bytes] | None) -> bool:
    """Write through a short name that is renamed; False for a file that is left alone.

    `ours` are earlier captions, which may be replaced; None lets any text be replaced.
    """
    try:
        with open(target, encoding="utf-8", errors="replace", newline="") as file:
            found = file.read(_MOST_READ)
        if found == text:
            return True
        if ours is not None and _said(name, found.removesuffix("\n")) not in ours:
            return False
    except FileNotFoundError:
        pass
    folder = os.path.dirname(target) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".vlm-{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(temporary, target)
    return True
