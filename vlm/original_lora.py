"""Adapters that the original LLaVA repository trained, merged into the weights under them.

peft wrote them; their arithmetic is done here, on one weight at a time, so that the model
never needs a second copy. `tests/vlm/test_original.py` compares it with peft's own.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm.errors import CheckpointError
from vlm.folder import ADAPTER_CONFIG, read_json
from vlm.pickled import read_file

_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
# Settings that change what is added to a weight, with the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "trainable_token_indices": ([], None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    # The others start from a changed weight, which the folder of the base does not hold.
    "init_lora_weights": (True, False, "gaussian", None),
}


class Pair(NamedTuple):
    """The two factors of an update: `a` (rank, in) and `b` (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor


class Adapter(NamedTuple):
    """Updates by the name of their weight, in the original layout's spelling."""

    pairs: dict[str, Pair]
    scale: float

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """``W + scale * B @ A`` in float32 (Hu et al. 2021, section 4.1).

        Args:
            name: a key of `pairs`.
            weight: (out, in), of the base model.

        Raises:
            CheckpointError: the update has another shape.
        """
        a, b = self.pairs[name]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"the adapter's update of {name} is {b.shape[0]} x {a.shape[1]} but the weight has "
                f"shape {list(weight.shape)}; give the model that it was trained on, with "
                "--language FOLDER"
            )
        return weight.float() + b.float() @ a.float() * self.scale


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder.

    Raises:
        CheckpointError: a file is absent or broken, or the adapter is more than plain LoRA.
    """
    config = read_json(folder, ADAPTER_CONFIG)
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: {key} {config[key]!r} is no plain LoRA; merge the "
                "adapter with peft first and convert the whole model"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: r {rank!r} and lora_alpha {alpha!r} are no rank and scale"
        )
    halves: dict[str, dict[str, torch.Tensor]] = {}
    path = folder / "adapter_model.safetensors"
    path = path if path.is_file() else path.with_suffix(".bin")
    for name, tensor in read_file(path).items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{path}: unexpected weight {name}; known: lora_A and lora_B")
        halves.setdefault(f"{found['layer']}.weight", {})[found["half"]] = tensor
    for name, half in halves.items():
        shapes = {key: list(tensor.shape) for key, tensor in sorted(half.items())}
        fits = len(half) == 2 and half["A"].ndim == half["B"].ndim == 2
        if not fits or not half["A"].shape[0] == half["B"].shape[1] == rank:
            raise CheckpointError(
                f"{path}: {name} has the factors {shapes}; A and B of rank {rank} are needed"
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter({name: Pair(half["A"], half["B"]) for name, half in halves.items()}, scale)
