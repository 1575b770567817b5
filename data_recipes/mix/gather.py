"""Sources to a mixture: read, filtered, and laid out so that any record is at hand."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_recipes.formats import read, write_jsonl
from data_recipes.formats.faults import Report
from data_recipes.formats.write import JSONL
from data_recipes.mix.mixture import Mixture
from data_recipes.mix.order import shares
from data_recipes.mix.settings import Filters, MixConfig, SourceConfig
from data_recipes.tokens import TokenCounter, encode
from vlm.errors import ConfigError, RecordError
from vlm.messages import Record
from vlm.record_files import RecordFiles


@dataclass
class Gathered:
    """What became of one source.

    Attributes:
        path: as the mixture names it.
        read: records that were read.
        left_out: how many each filter left out; the first that does counts.
        kept: the others.
        taken: records in the mixture; more than `kept` if some come again.
    """

    path: str
    read: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    taken: int = 0


def gather(
    config: MixConfig,
    folder: Path,
    processor: TokenCounter | None = None,
    faults: Report | None = None,
) -> tuple[Mixture, list[Gathered]]:
    """Read and filter the sources of a mixture; memory does not grow with the records' texts.

    Args:
        config: of `load_mix`.
        folder: what is kept is written there and read by the mixture: a JSONL file of each
            source, and pictures that are bytes. Other pictures stay where they are.
        processor: of the model that will be trained, for filters by tokens.
        faults: told of rows that cannot be used; without it the first one raises.

    Raises:
        ConfigError: a filter counts tokens without a processor, nothing of a source is
            kept, or the counted sources have more records than the mixture.
        RecordError: a source cannot be read.
    """
    if processor is None and any(source.filters.needs_tokens for source in config.sources):
        raise ConfigError("min_tokens and max_tokens need a model that counts; add --model DIR")
    found = []
    for number, source in enumerate(config.sources):
        told = Gathered(source.path)
        place = folder / str(number)
        told.kept = write_jsonl(_kept(source, told, processor, faults), place)
        if not told.kept:
            raise ConfigError(
                f"nothing is kept of {source.path}: {told.read:,} records read, left out by "
                f"{_by(told.left_out)}; widen its filters or remove it"
            )
        found.append(told)
    for told, count in zip(found, _counts(config, [each.kept for each in found]), strict=True):
        told.taken = count
    files = [RecordFiles([folder / str(number) / JSONL]) for number in range(len(found))]
    counts = [each.taken for each in found]
    return Mixture(files, counts, seed=config.seed, shuffle=config.shuffle), found


def _kept(
    source: SourceConfig, told: Gathered, processor: TokenCounter | None, faults: Report | None
) -> Iterator[Record]:
    options: dict[str, Any] = {"format": source.format, "images": source.images}
    for record in read(source.path, split=source.split, faults=faults, **options):
        told.read += 1
        reason = left_out_by(source.filters, record, processor)
        if reason is None:
            yield record
        else:
            told.left_out[reason] = told.left_out.get(reason, 0) + 1


def left_out_by(filters: Filters, record: Record, processor: TokenCounter | None) -> str | None:
    """The filter that leaves a record out, or None; the cheap ones are asked first.

    Raises:
        RecordError: a score is no number.
    """
    if filters.has_picture is not None and bool(record.images) != filters.has_picture:
        return "has_picture"
    if filters.sources is not None and record.source not in filters.sources:
        return "sources"
    if filters.licenses is not None and record.license not in filters.licenses:
        return "licenses"
    for key, least in filters.min_score.items():
        score = _score(record, key)
        if score is None or not score >= least:
            return f"min_score {key}"
    characters = sum(len(message.text) for message in record.messages)
    if not _is_within(characters, filters.min_characters, filters.max_characters):
        return "characters"
    if processor is not None and filters.needs_tokens:
        tokens = len(encode(processor, record)[0])
        if not _is_within(tokens, filters.min_tokens, filters.max_tokens):
            return "tokens"
    return None


def _is_within(number: int, least: int | None, most: int | None) -> bool:
    return (least is None or number >= least) and (most is None or number <= most)


def _score(record: Record, key: str) -> float | None:
    value = record.meta.get(key)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise RecordError(
            f"record {record.id!r}: its meta has {value!r} as {key}, which is no number; "
            "correct it, or filter by another key"
        ) from None


def _counts(config: MixConfig, kept: Sequence[int]) -> list[int]:
    counts = [
        source.count or round((source.epochs or 1) * number) if source.weight is None else 0
        for source, number in zip(config.sources, kept, strict=True)
    ]
    if config.size is None:
        return counts
    left = config.size - sum(counts)
    if left < 0:
        raise ConfigError(
            f"the sources without a weight have {sum(counts):,} records, but size is "
            f"{config.size:,}; raise size, or lower their count"
        )
    weighted = [i for i, source in enumerate(config.sources) if source.weight is not None]
    weights = [config.sources[i].weight or 0.0 for i in weighted]
    for i, count in zip(weighted, shares(weights, left), strict=True):
        counts[i] = count
    return counts


def _by(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in left_out.items()) or "nothing"
