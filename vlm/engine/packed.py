"""Weights rearranged once for the CPU's matrix kernels: same numbers, less time a step.

oneDNN's own layout is faster than a plain matrix, most of all for the few rows of a decode
step. The operators are private to PyTorch, so each is tried on the spot and left alone if
it is missing or gives other values.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

Linear = Callable[[torch.Tensor], torch.Tensor]
_SMALL = 2**18  # weights; up to here the plain product of a single row is the faster one
# Of the largest value: a matrix product summed in another order.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pack_linears(model: nn.Module, but: Collection[nn.Module] = ()) -> int:
    """Let linear layers on the CPU, in float32 or bfloat16, compute from packed copies.

    The layers stay what they are, with their own weights, and compute as before again while
    gradients are needed. Weights must not change afterwards; `unpack_linears` undoes it.

    Args:
        model: whose layers are packed.
        but: layers that are computed in another way.

    Returns:
        How many layers were packed.
    """
    packed = 0
    left = {id(layer) for layer in but}
    for layer in model.modules():
        if is_plain(layer) and id(layer) not in left:
            packed += _pack(layer)
    return packed


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer as torch has it, of a kind that can be packed."""
    if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:
        return False  # a subclass computes in a way of its own
    return "forward" not in vars(layer) and _fits(layer.weight)


@torch.no_grad()
def pack_joined(layers: Sequence[nn.Module]) -> Linear | None:
    """Linear layers of one input as one product: (n, in) to their outputs side by side.

    Returns:
        None where they cannot be packed.
    """
    plain: list[nn.Linear] = [layer for layer in layers if is_plain(layer)]
    if len(plain) < len(layers):
        return None
    weights: list[torch.Tensor] = [layer.weight.detach() for layer in plain]
    weight = torch.cat(weights)
    bias = None
    if any(layer.bias is not None for layer in plain):
        biases: list[torch.Tensor] = [
            layer.weight.new_zeros(layer.out_features)
            if layer.bias is None
            else layer.bias.detach()
            for layer in plain
        ]
        bias = torch.cat(biases)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        linear = partial(_product, weight=packed, bias=bias)
        return linear if _is_close(linear, weight, bias) else None
    except (AttributeError, RuntimeError):  # another build of PyTorch
        return None


def _product(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(..., in) -> (..., out), by a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, "none", [], "")


def _is_close(linear: Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether it gives the plain product's values on two rows."""
    probe = torch.linspace(-1, 1, 2 * weight.shape[1]).view(2, -1).to(weight.dtype)
    expected = F.linear(probe, weight, bias)
    allowed = _TOLERANCES[weight.dtype] * (1 + expected.abs().max())
    return bool((linear(probe) - expected).abs().max() <= allowed)


def unpack_linears(model: nn.Module) -> None:
    """Undo `pack_linears` and free the copies."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            vars(layer).pop("forward", None)


def _fits(weight: torch.Tensor) -> bool:
    usable = weight.device.type == "cpu" and weight.dtype in _TOLERANCES
    return usable and bool(torch.backends.mkldnn.is_available())


@torch.no_grad()
def _pack(layer: nn.Linear) -> bool:
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        linear = partial(_packed_linear, layer=layer, weight=weight)
        if not _is_close(linear, layer.weight, layer.bias):
            return False
    except (AttributeError, RuntimeError):  # another build of PyTorch
        return False
    layer.forward = linear  # type: ignore[method-assign]
    return True


def _packed_linear(features: torch.Tensor, layer: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """(..., in) -> (..., out)."""
    single = features.numel() == layer.in_features and layer.weight.numel() < _SMALL
    if single or torch.is_grad_enabled() or features.dtype != layer.weight.dtype:
        return F.linear(features, layer.weight, layer.bias)
    return _product(features, weight, layer.bias)
