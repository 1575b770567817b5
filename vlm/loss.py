"""Cross-entropy at supervised positions, a chunk of them at a time.

Logits of a whole batch are the largest tensor of a training step: 8,000 positions of a
vocabulary of 152,000 are 4.9 GB in float32, and their gradient as much again. Here a chunk's
logits become its loss and its gradients at once, and are forgotten.

Shapes: n positions, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

_CHUNK_NUMBERS = 2**25  # logits in memory at a time: 128 MiB in float32
Head = Callable[[torch.Tensor], torch.Tensor]


def summed_cross_entropy(
    states: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    parameters: Sequence[torch.Tensor],
    vocabulary: int,
    chunk: int | None = None,
) -> torch.Tensor:
    """The sum of the surprise over all positions, in nats: a scalar in float32.

    Args:
        states: (n, D), last hidden states.
        targets: (n,) token ids.
        head: states to logits (..., V).
        parameters: what `head` computes with; those that need gradients get them.
        vocabulary: V.
        chunk: positions at a time; by default as many as make 128 MiB of logits.
    """
    chunk = chunk or max(1, _CHUNK_NUMBERS // vocabulary)
    if len(states) <= chunk:
        return F.cross_entropy(head(states).float(), targets, reduction="sum")
    trained = [p for p in parameters if p.requires_grad]
    if not (torch.is_grad_enabled() and (states.requires_grad or trained)):
        pairs = zip(states.split(chunk), targets.split(chunk), strict=True)
        losses = [F.cross_entropy(head(s).float(), t, reduction="sum") for s, t in pairs]
        return torch.stack(losses).sum()
    total: torch.Tensor = _Chunked.apply(states, targets, head, chunk, *trained)
    return total


class _Chunked(torch.autograd.Function):
    """Gradients are made beside the loss, so that no logits outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
        chunk: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        of_states = torch.zeros_like(states)
        of_trained = [torch.zeros_like(p) for p in trained]
        for start in range(0, len(states), chunk):
            piece = states[start : start + chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(piece).float()
                loss = F.cross_entropy(logits, targets[start : start + chunk], reduction="sum")
            gradients = torch.autograd.grad(loss, [piece, *trained])
            of_states[start : start + chunk] = gradients[0]
            for total_of, gradient in zip(of_trained, gradients[1:], strict=True):
                total_of += gradient
            total += loss.detach()
        ctx.save_for_backward(of_states, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = grads
        of_states, *of_trained = (saved * upstream for saved in ctx.saved_tensors)
        return of_states, None, None, None, *of_trained
