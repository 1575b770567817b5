"""What a run needs before it is started: memory by part, a micro-batch that fits, hours.

Everything comes from configs; nothing is loaded. Memory is that of `train.plan_memory`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from train.config import load_config
from train.outline import llava_config, meta_model, shipped_runs
from train.plan_load import Spread, load_of_data
from train.plan_memory import Load, load_of, memory_of
from train.settings import RunConfig
from vlm.errors import ConfigError, RecordError
from vlm.model import VisionLanguageModel
from vlm.vision import num_patches

_GB = 1e9
_HEADROOM = 0.95  # of a card, for what the allocator cannot use
# GB and dense bfloat16 TFLOPS by NVIDIA's data sheets.
CARDS: dict[str, tuple[float, float]] = {
    "h100": (80, 989),
    "h200": (141, 989),
    "a100": (80, 312),
    "a100-40": (40, 312),
    "l40s": (48, 362),
    "rtx4090": (24, 165),
}


@dataclass(frozen=True)
class Plan:
    """A run on one card of several.

    Attributes:
        parameters: number by part; ``trained`` counts those of all parts that are.
        memory: bytes by part on each card.
        micro_batch: records of a forward pass on each card.
        accumulation: forward passes of a step.
        load: of a mean record.
        tokens: of the whole run.
        flops: of the whole run.
        hours: at the stated share of the cards' speed.
    """

    parameters: Mapping[str, int]
    memory: Mapping[str, float]
    micro_batch: int
    accumulation: int
    load: Load
    tokens: float
    flops: float
    hours: float

    @property
    def total(self) -> float:
        """Bytes on each card."""
        return sum(self.memory.values())


def plan(
    config: RunConfig,
    model: VisionLanguageModel,
    load: Load,
    *,
    records: int,
    gpus: int = 1,
    memory: float = 80.0,
    tflops: float = 989.0,
    mfu: float = 0.45,
) -> Plan:
    """The largest micro-batch that fits at the recipe's global batch, and what follows.

    Args:
        config: of the run.
        model: on the meta device, its stage applied; see `train.outline.meta_model`.
        load: of a mean record.
        records: of an epoch.
        gpus: cards.
        memory: of each, in GB.
        tflops: of each in the run's precision, in 1e12 operations a second.
        mfu: the share of it that is reached.

    Raises:
        ConfigError: not even one record fits; names the largest part and what to change.
    """
    a_card = config.batch_size * config.gradient_accumulation
    for micro in sorted((n for n in range(1, a_card + 1) if a_card % n == 0), reverse=True):
        parts = memory_of(config, model, load, micro, gpus)
        if sum(parts.values()) <= _HEADROOM * memory * _GB:
            break
    else:
        name = max(parts, key=lambda key: parts[key])
        raise ConfigError(
            f"one record a card needs {sum(parts.values()) / _GB:.1f} GB of {memory:g}, most of it "
            f"{name} ({parts[name] / _GB:.1f} GB); {_advice(config)}"
        )
    steps = config.epochs * records / (a_card * gpus)
    seen = (config.max_steps if config.max_steps > 0 else steps) * a_card * gpus
    flops = seen * flops_of(config, model, load)
    return Plan(
        parameters=parameters_of(model),
        memory=parts,
        micro_batch=micro,
        accumulation=a_card // micro,
        load=load,
        tokens=seen * load.tokens,
        flops=flops,
        hours=flops / (gpus * tflops * 1e12 * mfu) / 3600,
    )


def parameters_of(model: nn.Module) -> dict[str, int]:
    """Numbers by part, and ``trained`` of all."""
    found = {name: 0 for name, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        part = "adapter" if ".lora_" in name else name.partition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return {**found, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def flops_of(config: RunConfig, model: VisionLanguageModel, load: Load) -> float:
    """Operations of one record, two for a multiplication with its addition."""
    text = model.config.text_config
    decoder = [p for n, p in model.language_model.named_parameters() if ".layers." in n]
    body = sum(p.numel() for p in decoder)
    learnt = sum(p.numel() for p in decoder if p.requires_grad)
    attention = text.num_hidden_layers * load.tokens * text.hidden_size  # q k and p v, causal: half
    passes = 3 if config.gradient_checkpointing else 2  # again, and through the activations
    # a product of two activations has two gradients, one of a frozen weight has one
    decoding = load.tokens * (2 * passes * body + 2 * learnt + 2 * (passes + 1) * attention)
    trains_head = any(p.requires_grad for p in model.get_output_embeddings().parameters())
    head = load.learnt * 2 * text.hidden_size * text.vocab_size * (3 if trains_head else 2)
    tower = sum(p.numel() for n, p in model.vision_tower.named_parameters() if "layers." in n)
    look = load.pictures * num_patches(model.config.vision_config) * 2 * tower
    return float(decoding + head + look * (3 if config.unfreeze_vision else 1))


def _advice(config: RunConfig) -> str:
    ways = []
    if config.lora is None and config.stage == "instruct":
        ways.append("train LoRA (lora.r=128)")
    elif config.model.quantize is None and config.lora is not None:
        ways.append("model.quantize=4bit")
    if config.sharding == "none":
        ways.append("sharding=fsdp2")
    if not config.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    return "try " + ", ".join(ways or ["a smaller model or larger cards"])


def rows_of(found: Plan) -> list[tuple[str, str]]:
    """The plan as pairs for people."""
    rows: list[tuple[str, Any]] = [(n, f"{c / 1e6:,.1f} M") for n, c in found.parameters.items()]
    rows += [(name, f"{size / _GB:,.2f} GB") for name, size in found.memory.items()]
    rows += [
        ("a card in all", f"{found.total / _GB:,.2f} GB"),
        ("batch_size", str(found.micro_batch)),
        ("gradient_accumulation", str(found.accumulation)),
        ("tokens of a record", f"{found.load.tokens:,}, {found.load.learnt:,} of them learnt"),
        ("tokens", f"{found.tokens:,.0f}"),
        ("operations", f"{found.flops:.3g}"),
        ("hours", f"{found.hours:,.2f}"),
    ]
    return rows


def _sampled(config: RunConfig, is_counted: bool) -> Spread | None:
    """The run's data; None where there is none yet and its records are counted otherwise."""
    absent = [path for path in config.data if not Path(path).is_file()]
    if absent and not is_counted:
        raise RecordError(f"no data file {absent[0]}; build it, or say how many with --records N")
    return None if absent else Spread(config.data)


def plan_recipe(
    recipe: str,
    overrides: list[str],
    *,
    records: int | None,
    tokens: int | None,
    parts: tuple[str, str] | None,
    card: str = "h100",
    memory: float | None = None,
    tflops: float | None = None,
    **options: Any,
) -> Plan:
    """The plan of a recipe; see `plan`.

    Args:
        recipe: a file or a shipped name.
        overrides: ``key=value``.
        records: of an epoch; by default those of the data files.
        tokens: of a mean record; by default those of a sample of the data, and where there is
            none yet the visual ones and 200.
        parts: folders of tower and language model, where ``model.start`` is not made yet; by
            default those of the shipped recipe that makes it.
        card: a key of `CARDS`, for what the next two do not say.
        memory: of a card, in GB.
        tflops: of a card.
        options: of `plan`.

    Raises:
        ConfigError: a stage without pictures, or a run that does not fit.
        CheckpointError: a folder has no config. RecordError: a data file is missing.
    """
    if card not in CARDS:
        raise ConfigError(f"unknown card {card!r}; known: {', '.join(CARDS)}; or say --tflops")
    config = load_config(recipe, overrides)
    if config.stage not in ("align", "instruct"):
        raise ConfigError(
            f"stage {config.stage} makes small models from nothing; plan align or instruct"
        )
    seen = config
    if parts is not None:
        folders = config.model.model_copy(update={"vision": parts[0], "language": parts[1]})
        seen = config.model_copy(update={"stage": "align", "model": folders})
    found = llava_config(seen, list(shipped_runs().values()))
    if found is None:
        raise ConfigError(f"{recipe}: its parts are not made yet; make them, or name others")
    model, _ = meta_model(config, found)
    data = _sampled(config, records is not None) if records is None or tokens is None else None
    if records is None:
        assert data is not None
        records = data.num_all
    load = None
    if tokens is None and data is not None:
        load = load_of_data(seen, data, list(shipped_runs().values()))
    options |= {"memory": memory or CARDS[card][0], "tflops": tflops or CARDS[card][1]}
    return plan(config, model, load or load_of(found, tokens, None), records=records, **options)
