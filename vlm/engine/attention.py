"""Attention over the places of `vlm.engine.slots`.

The decoder sees one sequence: the newest token of every running row, then the prompts of
the rows that start. Its linear layers work on all of them at once and nothing is padded;
only attention must know which token belongs to whom. It is called through transformers'
own attention interface, so every decoder that uses the interface is served.

Shapes: G key-value heads, S positions, E head width, n tokens a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from vlm.engine.slots import Segment, Step, current

ATTENTION = "vlm_slots"


@contextmanager
def stepping(
    step: Step, device: torch.device, layer: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Iterator[None]:
    """Let `attend` work by `step` in this thread; one step at a time.

    Args:
        step: what is computed.
        device: of the decoder.
        layer: keys and values to attend to, if the step adds none itself.
    """
    current.step = step
    current.rows = torch.arange(len(step.lengths), device=device)
    current.positions = torch.tensor(step.lengths, dtype=torch.long, device=device)
    current.layer = layer
    try:
        yield
    finally:
        del current.step, current.rows, current.positions, current.layer


@contextmanager
def running(config: PretrainedConfig, step: Step, device: torch.device) -> Iterator[None]:
    """Let the decoder of `config` itself attend by `step`."""
    with attending(config, ATTENTION), stepping(step, device):
        yield


@contextmanager
def attending(config: PretrainedConfig, implementation: str) -> Iterator[None]:
    """Let the decoder of `config` use an implementation of transformers' attention interface."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of n tokens, each to the positions of its own row up to itself.

    Args:
        module: the attention layer; gives the window if the caller does not.
        query: (1, heads, n, E).
        key: (1, G, n, E), already in the cache.
        value: as `key`.
        attention_mask: none; the step knows better.
        scaling: of the scores; by default one over the root of E.
        sliding_window: how many positions back a token sees, itself included.
        softcap: bound of the scores, as in Gemma 2.
    """
    step: Step = current.step
    keys, values = current.layer
    window = sliding_window or getattr(module, "sliding_window", None)
    count = len(step.lengths)
    parts: list[torch.Tensor] = []
    if count:
        reach = max(step.lengths) + 1
        q = query[0, :, :count].transpose(0, 1).unsqueeze(2)  # (rows, heads, 1, E)
        mask = _decode_mask(step, reach, window, q.dtype)
        out = dot_product(
            q, keys[:count, :, :reach], values[:count, :, :reach], mask, scaling, softcap
        )
        parts.append(out.squeeze(2))  # (rows, heads, E)
    offset = count
    for group in _groups(step.segments):
        s, size = group[0], len(group)
        end = s.start + s.length
        q = query[0, :, offset : offset + size * s.length]
        q = q.view(q.shape[0], size, s.length, -1).transpose(0, 1)  # (size, heads, length, E)
        places = slice(s.place, s.place + size)
        mask = _prefill_mask(step, s, window, q) if s.start or window else None
        out = dot_product(q, keys[places, :, :end], values[places, :, :end], mask, scaling, softcap)
        parts.append(out.transpose(1, 2).flatten(0, 1))  # (size * length, heads, E)
        offset += size * s.length
    return torch.cat(parts)[None], None


def dot_product(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scaled dot-product attention; without a mask it is causal."""
    groups = query.shape[1] // keys.shape[1]
    if softcap is not None:
        return _capped(query, keys, values, mask, scaling, softcap)
    length = query.shape[2]
    if groups > 1 and length == 1:  # the heads of a group as queries of one head
        q = query.view(query.shape[0], keys.shape[1], groups, -1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)
        return out.view_as(query[..., : values.shape[-1]])
    if groups > 1:
        keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None and length > 1, scale=scaling
    )


def _capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ keys.transpose(-1, -2) * scale / softcap)
    if mask is None:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values


def _decode_mask(
    step: Step, reach: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """(rows, 1, 1, reach): zero for a row's own positions, -inf beyond; None where all are seen.

    Added to the scores: made once a step, while a mask of bools would be converted in
    every layer.
    """
    if window is None and min(step.lengths) == max(step.lengths):
        return None
    if window not in step.masks:
        position = torch.arange(reach, device=current.positions.device)
        newest = current.positions[:, None]
        hidden = position > newest
        if window is not None:
            hidden |= position <= newest - window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        step.masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
    return step.masks[window]


def _prefill_mask(
    step: Step, segment: Segment, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """(length, start + length); made once a step, as the mask above."""
    shape = (segment.start, segment.length, window)
    if shape not in step.masks:
        step.masks[shape] = causal_mask(*shape, like)
    return step.masks[shape]


def causal_mask(start: int, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(length, start + length): zero for what tokens from `start` on may see, -inf beyond.

    Args:
        start: positions before the first token.
        length: tokens.
        window: how many positions back a token sees, itself included; None is all.
        like: gives device and dtype.
    """
    hidden = torch.ones(length, start + length, dtype=torch.bool, device=like.device)
    seen = hidden.tril(start)
    if window is not None:
        seen = seen.triu(start - window + 1)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _groups(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Segments of one shape in neighbouring places, which attend in one call."""
    group: list[Segment] = []
    for segment in segments:
        if group:
            last = group[-1]
            alike = (last.start, last.length) == (segment.start, segment.length)
            if not alike or segment.place != last.place + 1:
                yield group
                group = []
        group.append(segment)
    if group:
        yield group


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
