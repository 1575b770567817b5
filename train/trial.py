"""Whether a decoder can be packed: tried on a few tokens, against each record by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from train.attention import PACKED, Tree, allow_fused, packed_rows, read_only_what_is_learnt

_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, ImportError)
_TRIAL = (Tree(0, 3, (2, 3)), Tree(8, 4))
_TRIAL_ORDER = [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11]  # the records one by one
_TRIAL_PLACES = [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
_TRIAL_LABELS = torch.tensor([[-100, 0, -100, -100] * 3])  # which read places 0, 4 and 8


def enable_packing(model: PreTrainedModel) -> str | None:
    """Let a causal language model attend by blocks, if it gives its own numbers that way.

    Args:
        model: tried on a few tokens: packed, against each record by itself.

    Returns:
        None, or why the model stays as it was and its batches must be padded.
    """
    rates = [getattr(model.config, name, 0.0) or 0.0 for name in _DROPOUTS]
    if any(rates):
        return f"its attention has a dropout of {max(rates)}"
    before = model.config._attn_implementation
    expected = _alone(model)
    model.set_attn_implementation(PACKED)
    for fused in (True, False) if expected.is_cuda else (False,):
        allow_fused(fused)
        if _agrees(model, expected):
            hooks = read_only_what_is_learnt(model)
            if not _agrees(model, expected, _TRIAL_LABELS):
                for hook in hooks:
                    hook.remove()
            return None
    model.set_attn_implementation(before)
    return "its attention does not go through transformers' interface"


def _agrees(
    model: PreTrainedModel, expected: torch.Tensor, labels: torch.Tensor | None = None
) -> bool:
    """Whether packed rows give the states of single ones, where they are read."""
    try:
        off = (_packed(model, labels) - expected).abs()
    except _FAILURES:
        return False
    if labels is not None:
        off = off[[place % 4 == 0 for place in _TRIAL_ORDER]]
    allowed = 1e-4 if expected.dtype == torch.float32 else 5e-2
    return bool(off.max() <= allowed * expected.abs().max())


@torch.no_grad()
def _packed(model: PreTrainedModel, labels: torch.Tensor | None) -> torch.Tensor:
    """Final states (15, D) of the three records of the trial, the two with one beginning."""
    if labels is not None:
        labels = labels.to(model.device)
    with evaluating(model), packed_rows(_TRIAL, labels):
        places = torch.tensor([_TRIAL_PLACES], device=model.device)
        states = _states(model, list(range(12)), position_ids=places)
    return states[_TRIAL_ORDER]


@torch.no_grad()
def _alone(model: PreTrainedModel) -> torch.Tensor:
    """The same, each record by itself."""
    records = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9, 10, 11]]
    with evaluating(model):
        return torch.cat([_states(model, record) for record in records])


def _states(model: PreTrainedModel, tokens: list[int], **kwargs: Any) -> torch.Tensor:
    ids = torch.tensor([tokens], device=model.device) % model.config.vocab_size
    embeds = model.get_input_embeddings()(ids)
    states: torch.Tensor = model.get_decoder()(
        inputs_embeds=embeds, use_cache=False, **kwargs
    ).last_hidden_state[0]
    return states


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is in evaluation mode; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
