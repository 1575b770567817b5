"""Choosing tokens: against hand-computed sets and frequencies."""

import math

import pytest
import torch

from vlm.engine.sampling import Sampler, Sampling, next_tokens
from vlm.errors import ConfigError, GenerationError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("top_p", None),
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 10**10),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("seed", -1),
        ("seed", "lucky"),
        ("seed", 2**63),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert next_tokens(logits, [Sampler(Sampling()), Sampler(Sampling())]) == [1, 0]


def draws(sampling: Sampling, logits: torch.Tensor, number: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.pick(logits) for _ in range(number)]


def test_frequencies_follow_the_temperature() -> None:
    """P = softmax(logits / T): for logits ln 1, ln 4 and T = 2 that is 1 : 2."""
    found = draws(Sampling(temperature=2.0, seed=0), torch.tensor([0.0, math.log(4)]), 6000)
    assert abs(sum(found) / 6000 - 2 / 3) < 0.02


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    assert set(draws(Sampling(temperature=1.0, top_p=0.5, seed=1), logits, 300)) == {1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.51, seed=1), logits, 300)) == {1, 2}
    assert set(draws(Sampling(temperature=1.0, top_p=1.0, seed=1), logits, 300)) == {0, 1, 2, 3}


def test_kept_tokens_keep_their_proportions() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    found = draws(Sampling(temperature=1.0, top_p=0.8, seed=3), logits, 6000)
    assert abs(found.count(1) / 6000 - 2 / 3) < 0.02


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    flat = torch.zeros(1000)
    seeded = [draws(Sampling(temperature=1.0, seed=7), flat, 20) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert draws(Sampling(temperature=1.0, seed=8), flat, 20) != seeded[0]
    assert draws(Sampling(temperature=1.0), flat, 20) != draws(Sampling(temperature=1.0), flat, 20)


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(Sampling(temperature=1.0), torch.zeros(9), 5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_an_error_and_no_token(bad: float) -> None:
    logits = torch.tensor([[1.0, 2.0], [0.0, bad]])
    with pytest.raises(GenerationError, match="float32"):
        next_tokens(logits, [Sampler(Sampling()), Sampler(Sampling())])


def test_a_row_without_any_finite_logit_is_an_error() -> None:
    with pytest.raises(GenerationError):
        next_tokens(torch.full((1, 4), -math.inf), [Sampler(Sampling())])


def test_ruled_out_tokens_are_no_error() -> None:
    assert next_tokens(torch.tensor([[-math.inf, 0.0]]), [Sampler(Sampling())]) == [1]
