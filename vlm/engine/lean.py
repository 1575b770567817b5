"""The decoder blocks of the Llama family in few operations: same numbers, less time a step.

transformers' own layers spend most of a small step between their operations, and compute
all of the last layer where only each row's last token is read. This runs the same modules'
weights in the order of Llama (Touvron et al. 2023), Mistral and Qwen 2 and 3 (with its
norms of queries and keys), and is used only where it reproduces the decoder's own output.

Shapes: n tokens a step, B rows, D width, H heads, G key-value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm.engine.attention import attend, stepping
from vlm.engine.packed import Linear, pack_joined
from vlm.engine.slots import SlotCache, Step

_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
Norm = Callable[[torch.Tensor], torch.Tensor]


class LeanDecoder:
    """Runs steps like the decoder that it is made of.

    Args:
        decoder: of a supported structure, see `lean_decoder`.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._norms = [
            (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm))
            for layer in decoder.layers
        ]
        self._final = _norm(decoder.norm)
        self._fused: list[FusedLayer | None] = [None] * len(decoder.layers)

    def fuse(self) -> list[nn.Module]:
        """Join the weights of like inputs and pack them, where the hardware gains by it.

        Returns:
            The linear layers that are computed in this way.
        """
        self._fused = [fuse_layer(layer) for layer in self._decoder.layers]
        return [part for fused in self._fused if fused is not None for part in fused.linears]

    def __call__(self, embeds: torch.Tensor, step: Step, cache: SlotCache) -> torch.Tensor:
        """Embeddings (1, n, D) to final states (B, D) of each row's last token."""
        decoder, device = self._decoder, embeds.device
        positions, ends = step.position_ids(), step.last_tokens()
        cos, sin = decoder.rotary_emb(embeds, torch.tensor([positions], device=device))
        turn = (cos[0].unsqueeze(1), sin[0].unsqueeze(1))  # (n, 1, E)
        states = embeds[0]
        layers = list(zip(decoder.layers, self._norms, self._fused, strict=True))
        with stepping(step, device):
            for i, (layer, (before, after), fused) in enumerate(layers):
                query = self._project(layer.self_attn, before(states), turn, i, cache, fused)
                if i + 1 < len(layers):
                    mixed = _attend(layer.self_attn, query)
                    states = _close(layer, after, states, mixed, fused)
        # Of the last layer, only the last tokens are read: they attend like rows that run on.
        last = torch.tensor(ends, device=device)
        with stepping(Step([positions[end] for end in ends], []), device, cache.layer(i)):
            mixed = _attend(layer.self_attn, query[last])
        return self._final(_close(layer, after, states[last], mixed, fused))

    def _project(
        self,
        attention: Any,
        states: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        cache: SlotCache,
        fused: "FusedLayer | None",
    ) -> torch.Tensor:
        """Queries (n, H, E); keys and values go into the cache."""
        shape = (len(states), -1, attention.head_dim)
        if fused is not None:
            all_heads = fused.qkv(states).view(shape)
            heads, groups = fused.num_heads, fused.num_groups
            both, value = all_heads[:, : heads + groups], all_heads[:, heads + groups :]
            query, key = both[:, :heads], both[:, heads:]
        else:
            query = attention.q_proj(states).view(shape)
            key = attention.k_proj(states).view(shape)
            value = attention.v_proj(states).view(shape)
            heads, both = query.shape[1], None
        if hasattr(attention, "q_norm"):
            query, key, both = attention.q_norm(query), attention.k_norm(key), None
        both = _rotate(torch.cat([query, key], dim=1) if both is None else both, *turn)
        query, key = both[:, :heads], both[:, heads:]
        cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
        return query


def lean_decoder(decoder: Any) -> LeanDecoder | None:
    """A lean form of the decoder, or None where its structure is another.

    Its numbers are to be tried, see `vlm.engine.decoders`.
    """
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(_is_llama_layer(layer) for layer in layers):
        return None
    if not (hasattr(decoder, "rotary_emb") and hasattr(decoder, "norm")):
        return None
    windowed = getattr(decoder.config, "sliding_window", None) is not None
    if windowed and not all(hasattr(layer.self_attn, "sliding_window") for layer in layers):
        return None  # the window is given by the layer's caller: a short trial cannot tell
    return LeanDecoder(decoder)


def _is_llama_layer(layer: nn.Module) -> bool:
    if not all(hasattr(layer, name) for name in _PARTS):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    gated = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return (
        all(hasattr(attention, name) for name in (*_LINEAR, "head_dim", "scaling"))
        and all(hasattr(mlp, name) for name in gated)
        and len(list(layer.children())) == len(_PARTS)
    )


def _close(
    layer: Any,
    norm: Norm,
    states: torch.Tensor,
    mixed: torch.Tensor,
    fused: "FusedLayer | None",
) -> torch.Tensor:
    """The rest of a layer after its attention."""
    if fused is not None:
        states = states + fused.out(mixed)
        gate, up = fused.gate_up(norm(states)).chunk(2, dim=-1)
        return states + fused.down(layer.mlp.act_fn(gate) * up)
    states = states + layer.self_attn.o_proj(mixed)
    inner, mlp = norm(states), layer.mlp
    return states + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inner)) * mlp.up_proj(inner))


@dataclass(frozen=True)
class FusedLayer:
    """A layer's linear parts by packed weights.

    Attributes:
        qkv: (n, D) to queries, keys and values side by side, (n, (H + 2 G) * E).
        out: of attention.
        gate_up: (n, D) to the gate and what it lets through, side by side.
        down: back to (n, D).
        num_heads, num_groups: H and G.
        linears: the layers that these stand for.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    num_heads: int
    num_groups: int
    linears: tuple[nn.Module, ...]


def fuse_layer(layer: Any) -> FusedLayer | None:
    """The fused form of a layer of the Llama family, or None where it cannot be packed."""
    attention, mlp = layer.self_attn, layer.mlp
    sets = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    qkv, out, gate_up, down = (pack_joined(part) for part in sets)
    if qkv is None or out is None or gate_up is None or down is None:
        return None
    width = attention.head_dim
    heads = attention.q_proj.out_features // width
    groups = attention.k_proj.out_features // width
    return FusedLayer(
        qkv, out, gate_up, down, heads, groups, tuple(each for linears in sets for each in linears)
    )


def _attend(attention: Any, query: torch.Tensor) -> torch.Tensor:
    """(n, H, E) to (n, H * E)."""
    nothing = query[:0]
    mixed, _ = attend(
        attention, query.transpose(0, 1)[None], nothing, nothing, None, attention.scaling
    )
    return mixed[0].flatten(1)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021), by halves as in Llama."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def _norm(module: Any) -> Norm:
    """One operation for a plain RMS norm in float32; any other as it is."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or epsilon is None or weight.dtype != torch.float32:
        return module
    shape = tuple(weight.shape)
    return lambda states: F.rms_norm(states, shape, weight, epsilon)
