"""Projector: vision features into the language model's embedding space.

Shapes: (..., Dv) vision width -> (..., D) language width. Names of the layers are
those of `LlavaMultiModalProjector`, so that folders are interchangeable.
"""

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.activations import ACT2FN

from vlm.errors import CheckpointError

PREFIX = "multi_modal_projector."


def _widths(config: LlavaConfig) -> tuple[int, int]:
    chosen = config.vision_feature_layer
    num_layers = 1 if isinstance(chosen, int) else len(chosen)
    return config.vision_config.hidden_size * num_layers, config.text_config.hidden_size


class LinearProjector(nn.Module):
    """One linear layer, as in LLaVA 1.0 (Liu et al. 2023, section 4.1)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width_in, width_out = _widths(config)
        self.linear_1 = nn.Linear(width_in, width_out, bias=config.multimodal_projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., Dv) -> (..., D)."""
        return self.linear_1(features)


class MlpProjector(nn.Module):
    """Linear, activation, linear, as in LLaVA 1.5 (Liu et al. 2023b, section 3.2)."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        width_in, width_out = _widths(config)
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(width_in, width_out, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width_out, width_out, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., Dv) -> (..., D)."""
        return self.linear_2(self.act(self.linear_1(features)))


PROJECTORS: dict[str, type[LinearProjector] | type[MlpProjector]] = {
    "linear": LinearProjector,
    "mlp": MlpProjector,
    "mlp2x_gelu": MlpProjector,  # the same by LLaVA's name
}
# In config.json a linear projector is an MLP whose activation is the identity
# ("linear" in transformers' ACT2FN) and whose second layer is the identity matrix:
# the same function, which LlavaForConditionalGeneration can open. The extra key
# projector_type tells us to fold it back.
HIDDEN_ACT = {"linear": "linear", "mlp": "gelu", "mlp2x_gelu": "gelu"}


def projector_type(config: LlavaConfig) -> str:
    """The projector's key in `PROJECTORS`; folders of others do not name it and are MLPs.

    Raises:
        CheckpointError: the key is unknown, or contradicts projector_hidden_act.
    """
    kind = getattr(config, "projector_type", None) or "mlp"
    if kind not in PROJECTORS:
        raise CheckpointError(f"unknown projector {kind!r}; known: {', '.join(PROJECTORS)}")
    if kind == "linear" and config.projector_hidden_act != "linear":
        raise CheckpointError(
            f"projector_type 'linear' with projector_hidden_act {config.projector_hidden_act!r}; "
            "set projector_hidden_act to 'linear'"
        )
    return str(kind)


def build_projector(config: LlavaConfig) -> LinearProjector | MlpProjector:
    """A projector with nn.Linear's own random weights, as LLaVA starts it."""
    return PROJECTORS[projector_type(config)](config)


def to_disk(state: dict[str, torch.Tensor], config: LlavaConfig) -> dict[str, torch.Tensor]:
    """`state` with the identity layer that a linear projector has on disk."""
    if projector_type(config) != "linear":
        return state
    weight = state[PREFIX + "linear_1.weight"]
    width = config.text_config.hidden_size
    extra = {PREFIX + "linear_2.weight": torch.eye(width, dtype=weight.dtype)}
    if config.multimodal_projector_bias:
        extra[PREFIX + "linear_2.bias"] = torch.zeros(width, dtype=weight.dtype)
    return {**state, **extra}


def is_folded(name: str, tensor: torch.Tensor, config: LlavaConfig) -> bool:
    """Whether this tensor on disk is a linear projector's identity layer, to be left out.

    Raises:
        CheckpointError: it should be, but holds other values.
    """
    if not name.startswith(PREFIX + "linear_2.") or projector_type(config) != "linear":
        return False
    if tensor.ndim == 2:
        same = tensor.shape[0] == tensor.shape[1] and torch.equal(
            tensor, torch.eye(tensor.shape[0], dtype=tensor.dtype)
        )
    else:
        same = not tensor.any()
    if not same:
        raise CheckpointError(
            f"projector_type is 'linear' but {name} is not the identity; "
            "this folder was changed by another program, remove projector_type from config.json"
        )
    return True
