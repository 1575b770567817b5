"""What runs would do, told without doing it: values, data, parts, memory, and what is wrong."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml
from rich.console import Console

from train.config import RunConfig
from train.outline import meta_model
from train.preflight import Beginning, Outlook, look_ahead, memory_by_part, told_once
from train.stages import stage_table


def summarize(configs: Sequence[RunConfig], console: Console) -> list[str]:
    """Print the resolved recipes, their data and their parts.

    Args:
        configs: of runs that would be done one after the other.
        console: to print to.

    Returns:
        What is wrong, a line each.
    """
    runs = look_ahead(configs)
    for seen in runs:
        told = [yaml.safe_dump(seen.config.model_dump(), sort_keys=False).rstrip()]
        if seen.finished:
            told.append(f"{seen.config.output} holds the finished result of this recipe")
        for text in [*told, *map(_data_line, seen.data)]:
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        for line in _model_lines(seen):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        seen.problems += [line for data in seen.data for line in _absent(data)]
    return told_once(runs)


def _model_lines(seen: Outlook) -> Iterator[object]:
    if seen.model is None:
        return
    with torch.random.fork_rng(devices=[]):
        _, parts = meta_model(seen.config, seen.model)
    yield stage_table(seen.config.stage, parts)
    if seen.load is not None:
        sizes = memory_by_part(seen)
        told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
        yield f"a card needs {sum(sizes.values()) / 1e9:.2f} GB: {told}; `vlm plan` tells more"


def _data_line(data: Beginning) -> str:
    """Records of a file, and what the first of them look like."""
    pictures = sum(len(record.images) for record in data.records)
    turns = sum(m.role == "assistant" for record in data.records for m in record.messages)
    return (
        f"{data.path}: {data.num_all:,} records; the first {len(data)} have {pictures} pictures "
        f"and {turns} answers"
    )


def _absent(data: Beginning) -> Iterator[str]:
    names = (i for record in data.records for i in record.images if isinstance(i, str))
    absent = next((name for name in names if not Path(name).is_file()), None)
    if absent is not None:
        yield f"{data.path}: no picture {absent}; it is named by a record"
