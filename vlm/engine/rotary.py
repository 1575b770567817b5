"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): a table instead of a call.

A decoder's own module computes cosines and sines anew in every step. Where they depend on
the position alone, they are kept by position, as the module itself gives them.

Shapes: S positions, E head width, n tokens a step.
"""

from collections.abc import Sequence
from typing import Any

import torch

# Of these the angles do not depend on how long the sequence is.
_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
_GROWTH = 512  # positions


class RotaryTable:
    """Cosines and sines by position, for `vlm.engine.lean`.

    Args:
        rotary: of a decoder: ``rotary(states, position_ids)`` gives (1, n, E) twice.
    """

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED
        self._cos = self._sin = torch.empty(0)

    def at(self, positions: Sequence[int], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the module gives for these positions: (n, 1, E) twice.

        Args:
            positions: of the n tokens.
            like: gives device and dtype.
        """
        if not self._fixed:
            return self._compute(torch.tensor([list(positions)], device=like.device), like)
        last = max(positions)
        kept = self._cos
        if last >= len(kept) or kept.device != like.device or kept.dtype != like.dtype:
            every = torch.arange((last // _GROWTH + 1) * _GROWTH, device=like.device)
            self._cos, self._sin = self._compute(every[None], like)
        if isinstance(positions, range):
            return self._cos[positions[0] : last + 1], self._sin[positions[0] : last + 1]
        places = torch.tensor(positions, device=like.device)
        return self._cos[places], self._sin[places]

    def _compute(
        self, positions: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(like, positions)
        return cos[0].unsqueeze(1), sin[0].unsqueeze(1)
