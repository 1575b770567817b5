"""All that can be wrong with runs, told before the first of them starts; nothing is loaded."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlavaConfig

from train.config import RunConfig
from train.dataset import RecordDataset
from train.liger import check_liger
from train.outline import llava_config, maker_of, meta_model, processor_of
from train.plan_load import limits_of, mean_load
from train.plan_memory import Load, load_of, memory_of
from train.run import is_finished
from train.sharding import check_sharding
from train.survey import survey
from train.trackers import check_trackers
from vlm.caption_ranks import ranks_of_environment
from vlm.errors import ConfigError, RecordError, VlmError
from vlm.folder import is_adapter
from vlm.hub import resolve
from vlm.messages import Record
from vlm.processor import Processor
from vlm.weights import shard_paths

SAMPLE = 200  # records of each file that are read and encoded


class Beginning(RecordDataset):
    """The first records of one file.

    Attributes:
        path: of the file.
        num_all: records in it.
        records: the first ones that are well formed.
        malformed: a line for each that is not.
    """

    _most = sys.maxsize  # until all are counted

    def __init__(self, path: str) -> None:
        super().__init__([path])
        self.path, self.num_all = path, super().__len__()
        self._most = SAMPLE
        self.records: list[Record] = []
        self.malformed: list[str] = []
        for index in range(len(self)):
            try:
                self.records.append(self[index])
            except RecordError as error:
                self.malformed.append(str(error))

    def __len__(self) -> int:
        return min(super().__len__(), self._most)

    def fingerprint(self) -> str:
        """Nothing: only caches ask for it, and the whole file would be read."""
        return ""


@dataclass
class Outlook:
    """What is known of a run before it starts.

    Attributes:
        config: of the run.
        problems: a line each; the run would fail.
        data: the beginnings of its files, held-out ones last.
        model: config of its model, if it has one and all parts of it are known.
        load: of a mean record, as far as it is known.
        finished: its result stands already.
    """

    config: RunConfig
    problems: list[str] = field(default_factory=list)
    data: list[Beginning] = field(default_factory=list)
    model: LlavaConfig | None = None
    load: Load | None = None
    finished: bool = False

    @contextmanager
    def noting(self) -> Iterator[None]:
        """An error inside becomes one of the problems."""
        try:
            yield
        except VlmError as error:
            self.problems.append(str(error))


def look_ahead(configs: Sequence[RunConfig]) -> list[Outlook]:
    """Look at runs that are to be done one after the other."""
    return [_look(config, configs[:number]) for number, config in enumerate(configs)]


def problems_of(configs: Sequence[RunConfig]) -> list[str]:
    """What is wrong with runs that are about to be done one after the other, a line each."""
    problems = told_once(look_ahead(configs))
    for config in configs:
        try:
            check_sharding(config)
        except VlmError as error:
            problems.append(str(error))
    return problems


def told_once(runs: Sequence[Outlook]) -> list[str]:
    """The problems of all runs; what several have in common is said once."""
    return list(dict.fromkeys(line for seen in runs for line in seen.problems))


def _look(config: RunConfig, earlier: Sequence[RunConfig]) -> Outlook:
    seen = Outlook(config)
    with seen.noting():
        seen.finished = is_finished(config, Path(config.output))
    if seen.finished:
        return seen
    for path in [*config.data, *([config.eval_data] if config.eval_data else [])]:
        with seen.noting():
            seen.data.append(Beginning(path))
            seen.problems += seen.data[-1].malformed
    with seen.noting():
        check_trackers(config.watch.report_to)
    with seen.noting():
        seen.model = llava_config(config, earlier)
    if seen.model is not None:
        seen.load = load_of(seen.model, None, None)
        if config.liger:
            with seen.noting():
                check_liger(seen.model.text_config.model_type)
    with seen.noting():
        _check_parts(config, earlier)
        processor = processor_of(config, earlier)
        if processor is not None:
            _encode(seen, processor)
    if seen.model is not None:
        with seen.noting():
            _check_memory(seen)
    return seen


def _check_parts(config: RunConfig, earlier: Sequence[RunConfig]) -> None:
    """Raise CheckpointError unless the weights of each folder that is named are there."""
    for part in (config.model.vision, config.model.language, config.model.start):
        if part is None or maker_of(part, earlier) is not None:
            continue
        folder = Path(part)
        if folder.is_dir() and not is_adapter(folder):
            shard_paths(folder)
        elif config.stage in ("contrastive", "language"):
            resolve(part, weights=False)


def _encode(seen: Outlook, processor: Processor) -> None:
    """Encode the first records as the run will; notes problems, and the load of a mean record."""
    limits = limits_of(seen.config, processor)
    for data in [data for data in seen.data if not data.malformed]:
        with seen.noting():
            if data is seen.data[0]:
                seen.load = mean_load(data, processor, limits)
            else:
                survey(data, processor, limits)


def _check_memory(seen: Outlook) -> None:
    """Raise ConfigError if the card is too small for the recipe's batch; nothing on a CPU."""
    needed = sum(memory_by_part(seen).values())
    if not torch.cuda.is_available():
        return
    card = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
    if needed > card.total_memory:
        raise ConfigError(
            f"{seen.config.output}: batch_size={seen.config.batch_size} needs {needed / 1e9:.1f} "
            f"GB and the card has {card.total_memory / 1e9:.1f}; `vlm plan` tells which one fits"
        )


def memory_by_part(seen: Outlook) -> dict[str, float]:
    """Bytes on each card at the recipe's own batch size."""
    assert seen.model is not None and seen.load is not None
    with torch.random.fork_rng(devices=[]):
        model, _ = meta_model(seen.config, seen.model)
    world = ranks_of_environment()[1]
    return memory_of(seen.config, model, seen.load, seen.config.batch_size, world)
