"""Attention of packed rows: many records in one sequence, each blind to all others.

A row is a list of blocks. A plain block is a record; it attends to itself. A shared block
is what several records begin with, a picture and its question's opening, and the blocks
behind it are the records' own rests: each attends to the shared block and to itself. The
decoder's other layers work on all tokens at once and nothing is padded.

It is called through transformers' attention interface, so every decoder that uses the
interface is served; `enable_packing` tries the model's own before it is used.

Shapes: G key-value heads, E head width, T tokens of the row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlm.engine.attention import dot_product

Attention = Callable[..., tuple[torch.Tensor, None]]
PACKED = "vlm_packed"
_PLAIN = "sdpa"  # for batches without blocks
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, ImportError)


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
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)


# Plain, and set for the whole of a training step: with gradient checkpointing, layers run
# again in backward, which on a GPU happens in threads of its own.
_current: _Rows | None = None
_fused_works = False  # whether FlashAttention for rows of many lengths agrees here


@contextmanager
def packed_rows(trees: Sequence[Tree] | None) -> Iterator[None]:
    """Attend by `trees` inside; None is for batches that are padded. Not for two threads."""
    global _current
    before = _current
    if trees is None:
        _current = None
    else:
        flat = not any(tree.branches for tree in trees)
        _current = _Rows(list(trees), _fused_works and flat)
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
    assert dropout == 0.0, "enable_packing admits no decoder with attention dropout"
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


def enable_packing(model: PreTrainedModel) -> str | None:
    """Let a causal language model attend by blocks, if it gives its own numbers that way.

    Args:
        model: tried on a few tokens: packed, against each record by itself.

    Returns:
        None, or why the model stays as it was and its batches must be padded.
    """
    global _fused_works
    rates = [getattr(model.config, name, 0.0) or 0.0 for name in _DROPOUTS]
    if any(rates):
        return f"its attention has a dropout of {max(rates)}"
    before = model.config._attn_implementation
    expected = _alone(model)
    model.set_attn_implementation(PACKED)
    for _fused_works in (True, False) if expected.is_cuda else (False,):
        try:
            off = (_packed(model) - expected).abs().max()
        except _FAILURES:
            continue
        allowed = 1e-4 if expected.dtype == torch.float32 else 5e-2
        if off <= allowed * expected.abs().max():
            return None
    model.set_attn_implementation(before)
    return "its attention does not go through transformers' interface"


_TRIAL = (Tree(0, 3, (2, 3)), Tree(8, 4))
_TRIAL_PLACES = [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]


@torch.no_grad()
def _packed(model: PreTrainedModel) -> torch.Tensor:
    """Final states (15, D) of the three records of the trial, the two with one beginning."""
    with _evaluating(model), packed_rows(_TRIAL):
        places = torch.tensor([_TRIAL_PLACES], device=model.device)
        states = _states(model, list(range(12)), position_ids=places)
    return states[[0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]]


@torch.no_grad()
def _alone(model: PreTrainedModel) -> torch.Tensor:
    """The same, each record by itself."""
    records = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9, 10, 11]]
    with _evaluating(model):
        return torch.cat([_states(model, record) for record in records])


def _states(model: PreTrainedModel, tokens: list[int], **kwargs: Any) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device) % model.config.vocab_size
    embeds = model.get_input_embeddings()(ids)
    states: torch.Tensor = model.get_decoder()(
        inputs_embeds=embeds, use_cache=False, **kwargs
    ).last_hidden_state[0]
    return states


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, _own_mask)
