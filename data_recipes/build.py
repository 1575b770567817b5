"""Build a public data set: records and pictures, and lists of what is missing or faulty."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from data_recipes.download import fetch, require
from data_recipes.finder import Finder
from data_recipes.formats import Fault, write_jsonl
from data_recipes.formats.faults import FaultError
from data_recipes.formats.write import JSONL
from data_recipes.recipe import Recipe
from data_recipes.recipes import recipe
from data_recipes.rows import read_rows
from vlm.errors import ConfigError, ImageError, MessageError, RecordError, VlmError
from vlm.image_bytes import shorten, sniff
from vlm.messages import Record, parse_messages

MISSING, FAULTS, COUNTS = "missing.jsonl", "faults.jsonl", "counts.json"
_IMAGES, _DOWNLOADS = "images", "downloads"


@dataclass(frozen=True)
class Options:
    """What of a set is built.

    Args:
        limit: look at so many entries of the publisher, the first ones.
        subsets: only these, where a set has subsets.
        fetch: gives a picture by its URL, such as `vlm.remote.fetch_picture`; without it
            a URL is a fault.
        progress: told the number of records written.
    """

    limit: int | None = None
    subsets: Sequence[str] = ()
    fetch: Callable[[str], bytes] | None = None
    progress: Callable[[int], None] = field(default=lambda done: None)


def build(
    name: str, out: Path, from_dir: Path | None = None, options: Options | None = None
) -> Path:
    """Write ``out/records.jsonl``, which appears last, and the pictures below ``out/images``.

    Records whose picture is absent go to ``missing.jsonl``, entries that no record can be
    made of to ``faults.jsonl``; ``counts.json`` has written, missing, faulty and expected
    numbers. Files are downloaded to ``out/downloads`` unless ``from_dir`` has them; rows of
    the hub are streamed. Downloads and pictures that are there are not fetched again.

    Raises:
        ConfigError: no such recipe, files are absent, or an option does not apply.
        RecordError: a file is not in its publisher's format, or cannot be written.
    """
    chosen, options = recipe(name), options or Options()
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"limit is {options.limit}; it must be at least 1")
    if options.subsets and chosen.rows is None:
        raise ConfigError(f"{name} has no subsets; leave --subset out")
    try:
        return _write(chosen, _entries(chosen, out, from_dir, options), out, from_dir, options)
    except OSError as error:
        raise RecordError(f"{out}: cannot be written ({error}); choose another folder") from error


def _entries(
    chosen: Recipe, out: Path, from_dir: Path | None, options: Options
) -> Iterator[Record | Fault]:
    if chosen.rows is not None:
        return read_rows(chosen.rows, from_dir, options.subsets, options.fetch)
    assert chosen.records is not None
    folder = from_dir or out / _DOWNLOADS
    if from_dir is None:
        fetch((*chosen.sources, *(p.source for p in chosen.pictures if p.source.url)), folder)
    require(chosen.sources, folder)
    return _laid_out(chosen.records(folder))


def _laid_out(entries: Iterator[Record | Fault]) -> Iterator[Record | Fault]:
    """The same; an entry that lacks what the publisher's have ends it with a RecordError."""
    number = 0
    try:
        for each in entries:
            yield each
            number += 1
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, VlmError):
            raise
        raise RecordError(
            f"the entry after {number:,} others is not in the publisher's layout "
            f"({type(error).__name__}: {error}); fetch the annotations again"
        ) from error


def _write(
    chosen: Recipe,
    entries: Iterator[Record | Fault],
    out: Path,
    from_dir: Path | None,
    options: Options,
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    finder = Finder(chosen.pictures, from_dir or out / _DOWNLOADS, out / _IMAGES)
    with ExitStack() as stack:
        lists: dict[str, TextIO] = {
            name: stack.enter_context((out / name).open("w", encoding="utf-8"))
            for name in (MISSING, FAULTS)
        }
        kept = _Kept(chosen.license, finder, options, lists)
        written = write_jsonl(kept.of(islice(entries, options.limit)), out)
    counts = {"written": written, **kept.counts, "expected": chosen.count}
    (out / COUNTS).write_text(json.dumps(counts) + "\n")
    return out / JSONL


class _Kept:
    """The records that are whole, their pictures placed; others are listed and counted."""

    def __init__(
        self, license: str, finder: Finder, options: Options, lists: dict[str, TextIO]
    ) -> None:
        self._license, self._finder, self._options, self._lists = license, finder, options, lists
        self.counts = {"missing": 0, "faulty": 0}

    def of(self, entries: Iterator[Record | Fault]) -> Iterator[Record]:
        written = 0
        for each in entries:
            record = each if isinstance(each, Fault) else self._whole(each)
            if isinstance(record, Fault):
                self.counts["faulty"] += 1
                self._list(FAULTS, asdict(record))
                continue
            absent = [i for i in record.images if isinstance(i, str) and not self._finder.place(i)]
            if absent:
                self.counts["missing"] += 1
                self._list(MISSING, {"id": record.id, "images": absent})
                continue
            images = tuple(
                str(self._finder.out / i) if isinstance(i, str) else i for i in record.images
            )
            yield replace(record, images=images, license=record.license or self._license)
            written += 1
            self._options.progress(written)

    def _whole(self, record: Record) -> Record | Fault:
        """The record, its turns checked, and pictures of the web fetched."""
        try:
            parse_messages(record.messages)
            images = tuple(self._picture(each) for each in record.images)
        except FaultError as error:
            return Fault(f"record {record.id!r}", error.code, str(error))
        except (MessageError, ImageError) as error:
            return Fault(f"record {record.id!r}", "malformed", str(error))
        return replace(record, images=images)

    def _picture(self, image: str | bytes) -> str | bytes:
        if isinstance(image, str):
            if not image.lower().startswith(("http:", "https:")):
                return image
            if self._options.fetch is None:
                reason = f"{shorten(image)} is a URL; allow it by --allow-remote"
                raise FaultError(reason, "remote_url")
            image = self._options.fetch(image)
        sniff(image, "a picture of it")
        return image

    def _list(self, name: str, row: dict[str, object]) -> None:
        self._lists[name].write(json.dumps(row) + "\n")
