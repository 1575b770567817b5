"""Attention of packed rows: many records in one sequence, each blind to all others.

A row is a list of blocks. A plain block is a record; it attends to itself. A shared block
is what several records begin with, a picture and its question's opening, and the blocks
behind it are the records' own rests: each attends to the shared block and to itself. The
decoder's other layers work on all tokens at once and nothing is padded.

It is called through transformers' attention interface, so every decoder that uses the
interface is served; `train.trial` tries the model's own before it is used.

Shapes: G key-value heads, E head width, T tokens of the row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm.engine.attention import dot_product
from vlm.padding import IGNORE_INDEX

Attention = Callable[..., tuple[torch.Tensor, None]]
PACKED = "vlm_packed"
_PLAIN = "sdpa"  # for batches without blocks


@dataclass(frozen=True)
class Tree:
    """Tokens [start, end) of a row: a shared block, and branches that begin with it.

    Attributes:
        start: of the shared block.
        shared: its length; all of a plain record.
        branches: lengths of the rests, in their order.
    """

    start: int
    shared: int
    branches: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.shared + sum(self.branches)


@dataclass
class _Rows:
    """What the step in progress attends by; masks are made once for all layers."""

    trees: list[Tree]
    fused: bool
    read: torch.Tensor | None = None
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)


# Plain, and set for the whole of a training step: with gradient checkpointing, layers run
# again in backward, which on a GPU happens in threads of its own.
_current: _Rows | None = None
_may_fuse = False


def allow_fused(allowed: bool) -> None:
    """Let plain records in half precision go through FlashAttention for many lengths."""
    global _may_fuse
    _may_fuse = allowed


@contextmanager
def packed_rows(trees: Sequence[Tree] | None, labels: torch.Tensor | None = None) -> Iterator[None]:
    """Attend by `trees` inside; None is for batches that are padded. Not for two threads.

    Args:
        trees: of the row.
        labels: (1, T), where final states are read only to predict them: the last layer's
            other positions are then not computed to the end.
    """
    global _current
    before = _current
    if trees is None:
        _current = None
    else:
        flat = not any(tree.branches for tree in trees)
        read = None if labels is None else (labels[0, 1:] != IGNORE_INDEX).nonzero().flatten()
        _current = _Rows(list(trees), _may_fuse and flat, read)
    try:
        yield
    finally:
        _current = before


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row; batches without blocks go to transformers' own.

    Args:
        module: the attention layer; gives the window if the caller does not.
        query: (1, heads, T, E).
        key: (1, G, T, E).
        value: as `key`.
        attention_mask: none for packed rows.
        dropout: of the attention weights; none.
        scaling: of the scores; by default one over the root of E.
        sliding_window: how many positions back a token sees, itself included.
        softcap: bound of the scores, as in Gemma 2.
        **kwargs: for transformers' own attention.

    Returns:
        (1, T, heads, E), and no weights.
    """
    assert dropout == 0.0, "train.trial admits no decoder with attention dropout"
    if _current is None:
        if softcap is not None:  # which transformers' sdpa would leave out
            out = dot_product(query, key, value, attention_mask, scaling, softcap)
            return out.transpose(1, 2), None
        plain: Attention = ALL_ATTENTION_FUNCTIONS[_PLAIN]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = sliding_window or getattr(module, "sliding_window", None)
    if _current.fused and softcap is None and query.dtype != torch.float32:
        return _fused(query, key, value, scaling, window), None
    parts: list[torch.Tensor] = []
    for tree in _current.trees:
        first, rest = tree.start + tree.shared, tree.end
        own = slice(tree.start, first)
        mask = None
        if window is not None and window < tree.shared:
            mask = _mask(Tree(0, 0, (tree.shared,)), window, query)
        parts.append(
            dot_product(query[:, :, own], key[:, :, own], value[:, :, own], mask, scaling, softcap)
        )
        if tree.branches:
            seen = slice(tree.start, rest)
            q, k, v = query[:, :, first:rest], key[:, :, seen], value[:, :, seen]
            parts.append(dot_product(q, k, v, _mask(tree, window, query), scaling, softcap))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _mask(tree: Tree, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """(branch tokens, shared + branch tokens): zero where a branch's token sees, else -inf."""
    assert _current is not None
    name = (tree.shared, tree.branches, window)
    if name not in _current.masks:
        device, lengths = like.device, torch.tensor(tree.branches)
        branch = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        offset = torch.cat([torch.arange(length) for length in tree.branches])
        own = torch.cat([torch.full((tree.shared,), -1), branch])
        place = torch.cat([torch.arange(tree.shared), tree.shared + offset])
        query = place[tree.shared :, None]
        seen = ((own == -1) | (own == branch[:, None])) & (place <= query)
        if window is not None:
            seen &= place > query - window
        mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
        _current.masks[name] = mask.to(device)
    return _current.masks[name]


def _own_mask(*args: Any, **kwargs: Any) -> Any:
    """No mask for packed rows; transformers' own for padded batches."""
    if _current is not None:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[_PLAIN](*args, **kwargs)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """All plain records in one call of FlashAttention: (1, T, heads, E)."""
    from torch.nn.attention.varlen import varlen_attn

    assert _current is not None
    ends = torch.tensor([0, *(tree.end for tree in _current.trees)], dtype=torch.int32)
    ends = ends.to(query.device)
    longest = max(tree.shared for tree in _current.trees)
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def read_only_what_is_learnt(model: PreTrainedModel) -> list[RemovableHandle]:
    """Let the last layer's MLP, two thirds of it, work on the positions that are read."""
    mlp = getattr(getattr(model.get_decoder(), "layers", [None])[-1], "mlp", None)
    if mlp is None or any(isinstance(hook, _Pick) for hook in mlp._forward_pre_hooks.values()):
        return []
    return [mlp.register_forward_pre_hook(_Pick()), mlp.register_forward_hook(_spread)]


class _Pick:
    """Takes the positions that are read out of a packed row."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor | None:
        """(1, T, D) to (1, read, D)."""
        if _current is None or _current.read is None:
            return None
        return args[0][:, _current.read]


def _spread(
    module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor | None:
    """(1, read, D) to (1, T, D), zero elsewhere."""
    if _current is None or _current.read is None:
        return None
    whole = output.new_zeros(1, _current.trees[-1].end, output.shape[-1])
    return whole.index_copy(1, _current.read, output)


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, _own_mask)
