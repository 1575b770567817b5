"""A vision tower or a language model from a folder of its own, or out of a LLaVA folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vlm.errors import CheckpointError
from vlm.folder import one_line, part_config
from vlm.language import check_language_config
from vlm.vision import tower_kind
from vlm.weights import holds_nan, shard_paths

# What a whole CLIP or SigLIP model has besides the tower's layers.
NOT_THE_TOWER = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "head.",
    "vision_model.head.",
)


def load_language_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The decoder of a folder, in its own dtype by default.

    Raises:
        CheckpointError: it cannot be opened, or is no decoder-only language model.
    """
    config = part_config(folder)
    check_language_config(config)
    return _load(AutoModelForCausalLM, folder, config, dtype or "auto")


def load_vision_tower(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The tower of a folder of its own, or of a whole CLIP or SigLIP model.

    Raises:
        CheckpointError: it cannot be opened, or is of an unknown architecture.
    """
    config = vision_config(folder)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling; visual tokens are taken before it
    return _load(AutoModel, folder, config, dtype)


def vision_config(folder: Path) -> PretrainedConfig:
    """The checked config of the tower in a folder.

    Raises:
        CheckpointError: it cannot be read, or is of an unknown architecture.
    """
    config = part_config(folder)
    config = getattr(config, "vision_config", config)
    tower_kind(config)
    return config


def _load(
    auto: Any, folder: Path, config: PretrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    """A part's own weights by transformers, with nothing missing and nothing left over."""
    shard_paths(folder)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error
    check_keys(folder, info, optional=NOT_THE_TOWER)
    for name, tensor in model.state_dict().items():
        if holds_nan(tensor):
            raise CheckpointError(f"{folder}: {name} holds NaN; use another copy of the weights")
    return model


def check_keys(
    folder: Path, info: Mapping[str, Any], optional: tuple[str, ...] = (), way_out: str = ""
) -> None:
    """Raise CheckpointError unless what `from_pretrained` loaded was complete and no more.

    Args:
        folder: for the error.
        info: its loading info.
        optional: beginnings of names that may be left over.
        way_out: the end of the error's text.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        found = (key if isinstance(key, str) else key[0] for key in info[f"{kind}_keys"])
        names = sorted(k for k in found if kind != "unexpected" or not k.startswith(optional))
        if names:
            raise CheckpointError(
                f"{folder}: {len(names)} {kind} weights: {', '.join(names[:6])}{way_out}"
            )
