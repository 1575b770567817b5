"""Weights rearranged once for the CPU's matrix kernels: same numbers, less time a step.

oneDNN's own layout is faster than a plain matrix, most of all for the few rows of a decode
step. The operators are private to PyTorch, so each is tried on the spot and left alone if
it is missing or gives other values.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

_SMALL = 2**18  # weights; up to here the plain product of a single row is the faster one
# Of the largest value: a matrix product summed in another order.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def pack_linears(model: nn.Module) -> int:
    """Let linear layers on the CPU, in float32 or bfloat16, compute from packed copies.

    The layers stay what they are, with their own weights, and compute as before again while
    gradients are needed. Weights must not change afterwards; `unpack_linears` undoes it.

    Returns:
        How many layers were packed.
    """
    packed = 0
    for layer in model.modules():
        if type(layer) is nn.Linear and _fits(layer.weight) and "forward" not in vars(layer):
            packed += _pack(layer)
    return packed


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
        probe = torch.linspace(-1, 1, 2 * layer.in_features).view(2, -1).to(weight.dtype)
        got = _packed_linear(probe, layer, weight)
    except (AttributeError, RuntimeError):  # another build of PyTorch
        return False
    expected = F.linear(probe, layer.weight, layer.bias)
    allowed = _TOLERANCES[weight.dtype] * (1 + expected.abs().max())
    if (got - expected).abs().max() > allowed:
        return False
    layer.forward = partial(_packed_linear, layer=layer, weight=weight)  # type: ignore[method-assign]
    return True


def _packed_linear(features: torch.Tensor, layer: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """(..., in) -> (..., out)."""
    single = features.numel() == layer.in_features and layer.weight.numel() < _SMALL
    if single or torch.is_grad_enabled() or features.dtype != layer.weight.dtype:
        return F.linear(features, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(features, weight, layer.bias, "none", [], "")
