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


class Joined:
    """Linear layers of one input as one product: (n, in) to their outputs side by side.

    In float32 the product's weight lies column by column, which is the fastest for a single
    row, and the layers' own weights become parts of it, so that no memory is added. They
    stay what they were to everyone else: only their strides are others.

    Args:
        layers: of which `is_plain` holds.

    Attributes:
        layers: as given.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self._bias = _joined_bias(layers)
        self._packed: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        if layers[0].weight.dtype == torch.float32:
            self._weight = _columns(layers)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(n, in) -> (n, all outputs)."""
        packed = None if torch.compiler.is_compiling() else self._packed
        if self._weight is not None and (packed is None or len(features) == 1):
            return F.linear(features, self._weight, self._bias)
        if packed is not None:
            return _product(features, packed, self._bias)
        return torch.cat([layer(features) for layer in self.layers], dim=-1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> bool:
        """Compute more rows than one from a packed copy, if that gives the same values."""
        weight = self._weight
        if weight is None:
            weight = torch.cat([layer.weight for layer in self.layers])
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            linear = partial(_product, weight=packed, bias=self._bias)
            if _is_close(linear, weight, self._bias):
                self._packed = packed
        except (AttributeError, RuntimeError):  # another build of PyTorch
            return False
        return self._packed is not None


def to_columns(layer: nn.Module) -> None:
    """Let a plain layer's weight lie column by column, as those of `Joined` do."""
    if is_plain(layer) and layer.weight.dtype == torch.float32:
        Joined([layer])


def _columns(layers: Sequence[nn.Linear]) -> torch.Tensor:
    """The weights (all outputs, in) of which the layers' are parts, column by column."""
    first, total = layers[0].weight, sum(layer.out_features for layer in layers)
    offset, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    joined_already = True  # by another engine of the same model
    for layer in layers:
        w = layer.weight
        joined_already &= w.stride() == (1, total) and w.untyped_storage().data_ptr() == storage
        joined_already &= w.storage_offset() == offset
        offset += layer.out_features
    if joined_already:
        shape = (total, first.shape[1])
        return first.detach().as_strided(shape, (1, total), first.storage_offset())
    weight = torch.cat([layer.weight.detach().t() for layer in layers], dim=1).t()
    start = 0
    for layer in layers:
        layer.weight.data = weight[start : start + layer.out_features]
        start += layer.out_features
    return weight


def _joined_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    biases: list[torch.Tensor] = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return torch.cat(biases)


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
    """Undo `pack_linears` and `Joined`, and free the copies."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            vars(layer).pop("forward", None)
            if not layer.weight.is_contiguous():
                layer.weight.data = layer.weight.data.contiguous()


def _fits(weight: torch.Tensor) -> bool:
    usable = weight.device.type == "cpu" and weight.dtype in _TOLERANCES
    return usable and bool(torch.backends.mkldnn.is_available())


@torch.no_grad()
def _pack(layer: nn.Linear) -> bool:
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous())
        linear = partial(_packed_linear, layer=layer, weight=weight)
        if not _is_close(linear, layer.weight, layer.bias):
            return False
    except (AttributeError, RuntimeError):  # another build of PyTorch
        return False
    layer.forward = linear  # type: ignore[method-assign]
    return True


def _packed_linear(features: torch.Tensor, layer: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """(..., in) -> (..., out)."""
    single = features.numel() == layer.in_features
    if single and (layer.weight.numel() < _SMALL or layer.weight.stride(0) == 1):
        return F.linear(features, layer.weight, layer.bias)
    if torch.is_grad_enabled() or features.dtype != layer.weight.dtype:
        return F.linear(features, layer.weight, layer.bias)
    return _product(features, weight, layer.bias)
