"""Cross-entropy in chunks: the loss and the gradients of all positions at once."""

import pytest
import torch
from torch import nn

from vlm.loss import summed_cross_entropy

N, WIDTH, VOCABULARY = 23, 8, 50


def case(train_head: bool) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(train_head)
    states = torch.randn(N, WIDTH, requires_grad=True)
    return states, torch.randint(VOCABULARY, (N,)), head


def in_float64(
    states: torch.Tensor, targets: torch.Tensor, head: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the formula: log of the sum of exponentials less the target's own logit."""
    s, w, b = (t.detach().double().requires_grad_() for t in (states, head.weight, head.bias))
    logits = 5 * torch.tanh((s @ w.T + b) / 5)
    total = (logits.exp().sum(1).log() - logits[range(N), targets]).sum()
    total.backward()
    assert s.grad is not None and w.grad is not None
    return total.detach(), s.grad, w.grad


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 100])
@pytest.mark.parametrize("train_head", [True, False])
def test_loss_and_gradients_are_those_of_the_formula(chunk: int, train_head: bool) -> None:
    states, targets, head = case(train_head)
    expected, of_states, of_weight = in_float64(states, targets, head)

    def capped(some: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(head(some) / 5)

    loss = summed_cross_entropy(states, targets, capped, list(head.parameters()), VOCABULARY, chunk)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), 3 * of_states, rtol=1e-5, atol=1e-6)
    if train_head:
        assert head.weight.grad is not None
        torch.testing.assert_close(head.weight.grad.double(), 3 * of_weight, rtol=1e-5, atol=1e-6)
    else:
        assert head.weight.grad is None


def test_no_logits_of_the_whole_batch_exist() -> None:
    states, targets, head = case(True)
    seen: list[int] = []

    def watched(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return head(some)

    with torch.no_grad():
        summed_cross_entropy(states, targets, watched, list(head.parameters()), VOCABULARY, 5)
    assert seen == [5, 5, 5, 5, 3]
    seen.clear()
    loss = summed_cross_entropy(states, targets, watched, list(head.parameters()), VOCABULARY, 5)
    loss.backward()
    assert seen == [5, 5, 5, 5, 3]  # none is computed again for the gradient


def test_nothing_supervised_is_a_loss_of_zero() -> None:
    states, _, head = case(True)
    nothing = states[:0]
    loss = summed_cross_entropy(
        nothing, torch.zeros(0, dtype=torch.long), head, list(head.parameters()), VOCABULARY, 5
    )
    loss.backward()
    assert loss.item() == 0.0
