"""The layers of a decoder of the Llama family, taken apart for `vlm.engine.lean`.

Going through modules costs more than the products of a small step, so what a step needs of
a layer is looked up once. Weights are shared with the layer, or packed for the CPU.

Shapes: n tokens a step, D width, H heads, G key-value heads, E head width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm.engine.packed import Joined, Linear, is_plain

Norm = Callable[[torch.Tensor], torch.Tensor]
_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
_ATTENTION = (*_LINEAR, "head_dim", "scaling", "num_key_value_groups")
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


class Block:
    """One layer.

    Args:
        layer: of which `is_llama_layer` holds.

    Attributes:
        attention: the layer's own, for `vlm.engine.attention`.
        scaling: of the scores.
        window: how many positions back a token sees, itself included; None is all.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self.scaling: float = attention.scaling
        self.window: int | None = getattr(attention, "sliding_window", None)
        self._width: int = attention.head_dim
        self._heads_a_group: int = attention.num_key_value_groups
        self._before, self._after = (
            norm_of(layer.input_layernorm),
            norm_of(layer.post_attention_layernorm),
        )
        self._query_norm = getattr(attention, "q_norm", None)
        self._key_norm = getattr(attention, "k_norm", None)
        self._act = mlp.act_fn
        self._into = (attention.q_proj, attention.k_proj, attention.v_proj)
        self._gates = (mlp.gate_proj, mlp.up_proj)
        self._qkv: Linear = _side_by_side(self._into)
        self._gate_up: Linear = _side_by_side(self._gates)
        self._out: Linear = attention.o_proj
        self._down: Linear = mlp.down_proj
        self._joined: list[Joined] = []

    def join(self) -> list[Joined]:
        """Compute what has one input in one product, where the layers are plain ones.

        Returns:
            The products: for all linear layers or for none.
        """
        if not self._joined:
            sets: list[Sequence[Any]] = [self._into, [self._out], self._gates, [self._down]]
            if not all(is_plain(layer) for layers in sets for layer in layers):
                return []
            self._joined = [Joined(layers) for layers in sets]
            self._qkv, self._out, self._gate_up, self._down = self._joined
        return self._joined

    def heads(
        self, states: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (n, H, E), keys and values (n, G, E) of states (n, D).

        Args:
            states: before the layer.
            turn: of `vlm.engine.rotary`, (n, 1, E) twice.
        """
        every = self._qkv(self._before(states)).view(len(states), -1, self._width)
        groups = every.shape[1] // (self._heads_a_group + 2)
        both, value = every[:, :-groups], every[:, -groups:]
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(both[:, :-groups]), self._key_norm(both[:, -groups:])
            both = torch.cat([query, key], dim=1)
        both = rotate(both, *turn)
        return both[:, :-groups], both[:, -groups:], value

    def close(self, states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The layer's output (n, D), from its input and what attention has mixed, (n, H * E)."""
        states = states + self._out(mixed)
        gate, up = self._gate_up(self._after(states)).chunk(2, dim=-1)
        return states + self._down(self._act(gate) * up)


def is_llama_layer(layer: nn.Module) -> bool:
    """Whether it has the parts of a layer of the Llama family and no others."""
    if not all(hasattr(layer, name) for name in _PARTS):
        return False
    return (
        all(hasattr(layer.self_attn, name) for name in _ATTENTION)
        and all(hasattr(layer.mlp, name) for name in _GATED)
        and len(list(layer.children())) == len(_PARTS)
    )


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), by halves as in Llama."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def norm_of(module: Any) -> Norm:
    """A plain RMS norm (Zhang and Sennrich 2019) in few operations; any other as it is."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or not epsilon or weight.dtype != torch.float32:
        return module
    shape, width = tuple(weight.shape), weight.numel()

    def norm(states: torch.Tensor) -> torch.Tensor:
        one = len(states) == 1 and states.device.type == "cpu"
        if not one or torch.compiler.is_compiling():
            return F.rms_norm(states, shape, weight, epsilon)
        # On the CPU rms_norm is six operations, each of which costs a single row the same.
        square = float(torch.dot(states[0], states[0]))
        return (states * weight).mul_((square / width + epsilon) ** -0.5)

    return norm


def _side_by_side(layers: Sequence[nn.Module]) -> Linear:
    """Layers of one input as one function: their outputs joined."""
    return lambda states: torch.cat([layer(states) for layer in layers], dim=-1)
