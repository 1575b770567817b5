"""What a run would do, told without doing it: values, data, parts."""

from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.console import Console
from transformers import AutoConfig, LlavaConfig

from train.config import RunConfig
from train.dataset import RecordDataset
from train.plan_memory import load_of, memory_of
from train.stages import STAGES, PartReport, apply_stage, stage_table
from vlm.checkpoint import empty_model, join_configs
from vlm.errors import RecordError
from vlm.folder import read_config
from vlm.hub import resolve
from vlm.model import VisionLanguageModel

_SAMPLE = 200  # records that are read for the summary
_EXTRA_ID = 1  # an image token that a language model may still have to get


def llava_config(config: RunConfig) -> LlavaConfig | None:
    """The config of the model of `align` or `instruct`, from the parts' configs alone.

    Raises:
        CheckpointError: a folder is missing or cannot be used.
    """
    model = config.model
    if config.stage == "instruct":
        assert model.start is not None
        return read_config(resolve(model.start))
    if config.stage != "align":
        return None
    assert model.vision is not None and model.language is not None
    vision, language = (
        AutoConfig.from_pretrained(resolve(p)) for p in (model.vision, model.language)
    )
    vision = getattr(vision, "vision_config", vision)
    language = getattr(language, "text_config", language)
    token = language.vocab_size - _EXTRA_ID
    return join_configs(vision, language, token, model.projector, model.vision_feature_layer, None)


def parts_of(config: RunConfig) -> list[PartReport]:
    """What would train, with numbers of parameters; nothing is loaded.

    Empty for the stages that make a model from nothing.
    """
    found = llava_config(config)
    return [] if found is None else meta_model(config, found)[1]


def meta_model(
    config: RunConfig, found: LlavaConfig
) -> tuple[VisionLanguageModel, list[PartReport]]:
    """A model without memory, with the run's stage applied, and what trains in it."""
    model = empty_model(found, "meta")
    with torch.device("meta"):
        report = apply_stage(
            model, STAGES[config.stage], config.lora, unfreeze_vision=config.unfreeze_vision
        )
    return model, report


def summarize(config: RunConfig, console: Console) -> None:
    """Print the resolved recipe, its data and its parts.

    Raises:
        RecordError: a data file is missing, or one of its first records is malformed.
        CheckpointError: a model folder is missing or cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        parts = parts_of(config)
    told = [yaml.safe_dump(config.model_dump(), sort_keys=False).rstrip(), *data_lines(config)]
    for text in told:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if parts:
        console.print(stage_table(config.stage, parts))
        console.print(_plan_line(config), highlight=False, markup=False, soft_wrap=True)


def _plan_line(config: RunConfig) -> str:
    """What the recipe's own batch needs on one card."""
    found = llava_config(config)
    assert found is not None
    model, _ = meta_model(config, found)
    sizes = memory_of(config, model, load_of(found, None, None), config.batch_size, 1)
    told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    return f"a card needs {sum(sizes.values()) / 1e9:.2f} GB: {told}; `vlm plan` tells more"


def data_lines(config: RunConfig) -> Iterator[str]:
    """One line a data file: records, and what the first of them look like."""
    for path in [*config.data, *([config.eval_data] if config.eval_data else [])]:
        data = RecordDataset([path])
        size = min(len(data), _SAMPLE)
        records = [data[index] for index in range(size)]
        absent = [i for r in records for i in r.images if not Path(i).is_file()]
        if absent:
            raise RecordError(f"{path}: no picture {absent[0]}; it is named by a record")
        pictures = sum(len(record.images) for record in records)
        turns = sum(m.role == "assistant" for record in records for m in record.messages)
        yield (
            f"{path}: {len(data):,} records; the first {size} have {pictures} pictures and "
            f"{turns} answers"
        )
