"""A mix.yaml to one file of records in the mixture's order, and an account of it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_recipes.formats import write_jsonl
from data_recipes.formats.faults import Report
from data_recipes.mix.gather import Gathered, gather
from data_recipes.mix.mixture import Mixture
from data_recipes.mix.settings import MixConfig
from data_recipes.tokens import TokenCounter
from vlm.errors import ConfigError
from vlm.messages import Record

ACCOUNT = "mix.json"
_POOL = ".mix"
_IMAGES = "images"


@dataclass(frozen=True)
class Mixed:
    """What was mixed.

    Attributes:
        records: in the file.
        order: sha256 of the order.
        sources: what became of each.
    """

    records: int
    order: str
    sources: list[Gathered]

    def __str__(self) -> str:
        lines = []
        for each in self.sources:
            left_out = "".join(f", {num:,} by {name}" for name, num in each.left_out.items())
            lines.append(
                f"{each.taken:>9,}  {each.path}: {each.read:,} read, {each.kept:,} kept"
                f"{', left out' if left_out else ''}{left_out.removeprefix(',')}, "
                f"{each.taken / each.kept:.2f} epochs"
            )
        return "\n".join([*lines, f"{self.records:>9,}  records, order {self.order[:12]}"])


def mix(
    config: MixConfig,
    out: Path | str,
    *,
    processor: TokenCounter | None = None,
    faults: Report | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Mixed:
    """Write ``records.jsonl``, pictures named relative to it, and ``mix.json``.

    Pictures that are files stay where they are; those that came inside a table become files
    in ``images/``. Each file appears whole or not at all, ``mix.json`` last. Text of all kept
    records is on disk twice meanwhile.

    Args:
        config: of `load_mix`.
        out: folder to write.
        processor: for filters by tokens.
        faults: told of rows that cannot be used; without it the first one raises.
        progress: told how many records are written.

    Raises:
        ConfigError: see `gather`; or the folder holds one of the sources, or cannot be written.
        RecordError: a source cannot be read.
    """
    out = Path(out).resolve()
    for source in config.sources:
        place = Path(source.path).resolve()
        if out in (place, place.parent):
            raise ConfigError(f"--out {out} holds the source {source.path}; choose another folder")
    pool = out / _POOL
    try:
        shutil.rmtree(pool, ignore_errors=True)
        (out / ACCOUNT).unlink(missing_ok=True)
        pool.mkdir(parents=True)
        mixture, sources = gather(config, pool, processor, faults)
        records = write_jsonl(_settled(mixture, pool, out, progress), out)
        mixed = Mixed(records, mixture.fingerprint(), sources)
        part = out / f"{ACCOUNT}.part"
        part.write_text(_account(config, mixed), encoding="utf-8")
        os.replace(part, out / ACCOUNT)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error}); choose another folder") from error
    finally:
        shutil.rmtree(pool, ignore_errors=True)
    return mixed


def _settled(
    mixture: Mixture, pool: Path, out: Path, progress: Callable[[int], None]
) -> Iterator[Record]:
    """The records in order; pictures of theirs that lie in the pool are moved out of it."""
    inside = f"{pool}{os.sep}"
    for i in range(len(mixture)):
        record = mixture[i]
        if any(str(image).startswith(inside) for image in record.images):
            images = (_moved(str(image), inside, out) for image in record.images)
            record = replace(record, images=tuple(images))
        yield record
        progress(i + 1)


def _moved(image: str, inside: str, out: Path) -> str:
    if not image.startswith(inside):
        return image
    place = out / _IMAGES / os.path.basename(image)
    if not place.exists():
        place.parent.mkdir(exist_ok=True)
        os.replace(image, place)
    return str(place)


def _account(config: MixConfig, mixed: Mixed) -> str:
    return json.dumps({**asdict(mixed), "config": config.model_dump()}, indent=2) + "\n"
