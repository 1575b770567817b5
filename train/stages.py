"""A stage is data: what each part of the model does while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from torch import nn

from train.config import LoraConfig, RunConfig
from vlm import lora as adapters
from vlm.errors import ConfigError
from vlm.model import VisionLanguageModel
from vlm.vision import idle_parameters

Role = Literal["FROZEN", "LORA", "TRAINABLE"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What trains: the role of every part, by the part's attribute name."""

    name: str
    roles: Mapping[str, Role]


STAGES: dict[str, Stage] = {
    "contrastive": Stage(
        name="contrastive",
        roles={
            "vision_tower": "TRAINABLE",
            "text_tower": "TRAINABLE",
            "vision_head": "TRAINABLE",
            "text_head": "TRAINABLE",
        },
    ),
    "language": Stage(name="language", roles={"model": "TRAINABLE", "lm_head": "TRAINABLE"}),
    "align": Stage(
        name="align",
        roles={
            "vision_tower": "FROZEN",
            "multi_modal_projector": "TRAINABLE",
            "language_model": "FROZEN",
        },
    ),
    "instruct": Stage(
        name="instruct",
        roles={
            "vision_tower": "FROZEN",
            "multi_modal_projector": "TRAINABLE",
            "language_model": "TRAINABLE",
        },
    ),
}


@dataclass(frozen=True)
class PartReport:
    """One line of the table: a part, its role, and its numbers of parameters."""

    part: str
    role: Role
    num_parameters: int
    num_trainable: int


def apply_stage(
    model: nn.Module, stage: Stage, lora: LoraConfig | None, *, unfreeze_vision: bool = False
) -> list[PartReport]:
    """Freeze and unfreeze the parts, attach LoRA where asked for, and say what came of it.

    Raises:
        ConfigError: LoRA for a stage that does not train the language model, or a tower to
            be unfrozen in a stage that has none or trains it anyway.
    """
    roles = dict(stage.roles)
    if unfreeze_vision:
        if roles.get("vision_tower") != "FROZEN":
            raise ConfigError(f"stage {stage.name} freezes no tower; remove unfreeze_vision")
        roles["vision_tower"] = "TRAINABLE"
    if lora is not None:
        if roles.get("language_model") != "TRAINABLE":
            raise ConfigError(f"stage {stage.name} does not train the language model; remove lora")
        assert isinstance(model, VisionLanguageModel)
        kinds = {"use_dora": lora.use_dora, "use_rslora": lora.use_rslora}
        adapters.attach(model, lora.r, lora.alpha, lora.dropout, **kinds)
        roles["language_model"] = "LORA"
    for part, role in roles.items():
        if role != "LORA":
            model.get_submodule(part).requires_grad_(role == "TRAINABLE")
    if unfreeze_vision:
        assert isinstance(model, VisionLanguageModel)
        for parameter in idle_parameters(model.vision_tower, model.config):
            parameter.requires_grad_(False)
    model.train()
    return [_report(model, part, role) for part, role in roles.items()]


def apply_run(model: nn.Module, config: RunConfig) -> list[PartReport]:
    """`apply_stage` as a recipe says."""
    stage = STAGES[config.stage]
    return apply_stage(model, stage, config.lora, unfreeze_vision=config.unfreeze_vision)


def stage_table(stage: str, report: list[PartReport]) -> Table:
    """The report as a table for people."""
    table = Table(title=f"stage {stage}", title_justify="left")
    table.add_column("part")
    table.add_column("role")
    table.add_column("parameters", justify="right")
    table.add_column("trained", justify="right")
    for line in report:
        table.add_row(line.part, line.role, f"{line.num_parameters:,}", f"{line.num_trainable:,}")
    return table


def _report(model: nn.Module, part: str, role: Role) -> PartReport:
    parameters = list(model.get_submodule(part).parameters())
    return PartReport(
        part,
        role,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
