"""Optimisers and their parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers, AdamW for everything else.

    Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, arXiv:2502.16982) admits
    matrices only, and embeddings and output layers do better with AdamW. Both inner
    optimisers share this one's ``param_groups``, so that a schedule reaches them.

    Args:
        groups: parameter groups, each with the keys ``params``, ``lr``, ``weight_decay``
            and ``muon`` (True for groups of matrices).
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        muon = [group for group in self.param_groups if group["muon"]]
        adamw = [group for group in self.param_groups if not group["muon"]]
        self._inner: list[torch.optim.Optimizer] = []
        if muon:
            self._inner.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw"))
        if adamw:
            self._inner.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95)))
        self._link()

    def _link(self) -> None:
        self.param_groups = [group for inner in self._inner for group in inner.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with both optimisers; ``closure`` is not supported."""
        assert closure is None
        for inner in self._inner:
            inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for inner in self._inner:
            inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both inner states, in a fixed order."""
        return {"inner": [inner.state_dict() for inner in self._inner]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for inner, state in zip(self._inner, state_dict["inner"], strict=True):
            inner.load_state_dict(state)
        self._link()


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    projector_learning_rate: float | None,
    vision_learning_rate: float | None = None,
    muon: bool,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters by rate, decay and kind of optimiser.

    Vectors (biases, norms) and embeddings are never decayed. With ``muon``, matrices that
    are not embeddings or ``lm_head`` go to Muon.
    """
    rates = {
        "multi_modal_projector": projector_learning_rate,
        "vision_tower": vision_learning_rate,
    }
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = rates.get(name.partition(".")[0]) or learning_rate
        inside = parameter.ndim == 2 and not _is_embedding(name)
        decay = weight_decay if inside else 0.0
        groups.setdefault((rate, decay, muon and inside), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "muon": matrices}
        for (rate, decay, matrices), parameters in groups.items()
    ]


def build_optimizer(groups: Iterable[dict[str, Any]], *, muon: bool) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for what Muon does not take."""
    listed = list(groups)
    if muon:
        return MuonWithAdamW(listed)
    plain = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in listed]
    return torch.optim.AdamW(plain, betas=(0.9, 0.999))


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
