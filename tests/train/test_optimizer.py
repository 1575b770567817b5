"""Parameter groups, and two optimisers that act as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from train.contrastive import DualEncoder
from train.optimizer import build_optimizer, parameter_groups
from vlm.checkpoint import load_checkpoint
from vlm.lora import attach
from vlm.vision import build_vision_tower

Group = dict[str, Any]


@pytest.fixture(params=[False, True], ids=["full", "lora"])
def model(llava: str, request: pytest.FixtureRequest) -> nn.Module:
    """A tiny model in the roles of `instruct`."""
    loaded, _ = load_checkpoint(llava)
    loaded.vision_tower.requires_grad_(False)
    return attach(loaded, r=2, alpha=4) if request.param else loaded


def group_of(model: nn.Module, **options: Any) -> dict[str, Group]:
    """The group of every parameter by the parameter's name."""
    defaults = {"weight_decay": 0.1, "projector_learning_rate": 0.5, "muon": False}
    groups = parameter_groups(model, learning_rate=0.25, **(defaults | options))
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group for group in groups for p in group["params"]}


def test_what_trains_is_in_one_group_and_what_is_frozen_in_none(model: nn.Module) -> None:
    groups = parameter_groups(
        model, learning_rate=1, weight_decay=0.1, projector_learning_rate=None, muon=True
    )
    listed = [id(p) for group in groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trained


def test_vectors_and_embeddings_are_never_decayed(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, group in group_of(model).items():
        is_table = "embed_tokens" in name or "lm_head" in name
        assert group["weight_decay"] == (0.0 if parameters[name].ndim == 1 or is_table else 0.1)


def test_embeddings_of_both_towers_are_not_decayed(llava: str) -> None:
    config = load_checkpoint(llava)[0].config
    dual = DualEncoder(build_vision_tower(config), 300)  # type: ignore[arg-type]
    for name, group in group_of(dual, muon=True).items():
        inside = "embed" not in name and dual.get_parameter(name).ndim == 2
        assert (group["weight_decay"], group["muon"]) == ((0.1, True) if inside else (0.0, False))


def test_the_projector_has_its_own_rate(model: nn.Module) -> None:
    for name, group in group_of(model).items():
        assert group["lr"] == (0.5 if name.startswith("multi_modal_projector.") else 0.25)
    assert {g["lr"] for g in group_of(model, projector_learning_rate=None).values()} == {0.25}


def test_muon_takes_the_matrices_inside(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, group in group_of(model, muon=True).items():
        is_table = "embed_tokens" in name or "lm_head" in name
        assert group["muon"] == (parameters[name].ndim == 2 and not is_table)
    assert not any(group["muon"] for group in group_of(model, muon=False).values())


class Tiny(nn.Module):
    """A table, two matrices and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.inside = nn.Linear(4, 4)
        self.multi_modal_projector = nn.Linear(4, 4, bias=False)

    def forward(self, step: int) -> torch.Tensor:
        hidden = self.multi_modal_projector(self.inside(self.embed.weight))
        return ((hidden - step) ** 2).sum()


def optimised(muon: bool) -> tuple[Tiny, torch.optim.Optimizer, LambdaLR]:
    model = Tiny()
    groups = parameter_groups(
        model, learning_rate=0.1, weight_decay=0.01, projector_learning_rate=0.02, muon=muon
    )
    optimizer = build_optimizer(groups, muon=muon)
    return model, optimizer, LambdaLR(optimizer, lambda step: 0.5**step)


def take(model: Tiny, optimizer: torch.optim.Optimizer, schedule: LambdaLR, step: int) -> None:
    optimizer.zero_grad()
    model(step).backward()
    optimizer.step()
    schedule.step()


def test_each_parameter_moves_as_under_its_own_optimiser() -> None:
    model, optimizer, schedule = optimised(muon=True)
    alone = Tiny()
    inner = [
        torch.optim.Muon(
            [alone.inside.weight], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.Muon(
            [alone.multi_modal_projector.weight],
            lr=0.02,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [alone.embed.weight, alone.inside.bias], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95)
        ),
    ]
    rates = [(0.1, 0.02, 0.1), (0.05, 0.01, 0.05), (0.025, 0.005, 0.025)]
    for step, of_step in enumerate(rates):
        take(model, optimizer, schedule, step)
        alone.zero_grad()
        alone(step).backward()
        for one, rate in zip(inner, of_step, strict=True):
            one.param_groups[0]["lr"] = rate
            one.step()
    for name, expected in alone.named_parameters():
        assert torch.equal(model.get_parameter(name), expected), name


@pytest.mark.parametrize("muon", [False, True])
def test_the_state_survives_saving(muon: bool, tmp_path: Path) -> None:
    straight = optimised(muon)
    for step in range(4):
        take(*straight, step)
    before, after = optimised(muon), optimised(muon)
    for step in range(2):
        take(*before, step)
    torch.save([part.state_dict() for part in before], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip(after, states, strict=True):
        part.load_state_dict(state)
    for step in range(2, 4):
        take(*after, step)
    assert [group["lr"] for group in after[1].param_groups] == [
        group["lr"] for group in straight[1].param_groups
    ]
    for name, expected in straight[0].named_parameters():
        assert torch.equal(after[0].get_parameter(name), expected), name


def test_cleared_gradients_are_gone_for_both() -> None:
    model, optimizer, _ = optimised(muon=True)
    model(0).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_only_matrices_or_none_at_all() -> None:
    for model in (nn.Linear(4, 4, bias=False), nn.LayerNorm(4)):
        groups = parameter_groups(
            model, learning_rate=0.1, weight_decay=0, projector_learning_rate=None, muon=True
        )
        before = model.weight.detach().clone()
        optimizer = build_optimizer(groups, muon=True)
        (model(torch.arange(8.0).view(2, 4)) ** 3).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
