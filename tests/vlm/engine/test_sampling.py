"""Choosing tokens: against hand-computed sets and frequencies."""

import math

import pytest
import torch

from vlm.engine.sampling import Draw, Sampler, Sampling, draw_rows, next_tokens
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
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_k", None),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 101),
        ("stop_strings", None),
        ("stop_strings", ""),
        ("stop_strings", ["a", ""]),
        ("stop_strings", ["a", 3]),
        ("stop_strings", b"a"),
        ("stop_strings", {"a"}),
        ("stop_strings", [*"123456789"]),
        ("stop_strings", "x" * 1001),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", 1.0),
        ("stop_loops", None),
        ("stop_loops", 1),
    ],
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_settings_are_equal_and_hashed_by_their_values() -> None:
    lists = [Sampling(stop_strings=strings) for strings in ("ab", ["ab"], ("ab",))]
    assert len(set(lists)) == 1 and lists[0].stop_strings == ("ab",)
    assert len({Sampling(stop_strings=[*"12345678"]), Sampling(), Sampling(logprobs=0)}) == 3


def test_greedy_takes_the_likeliest_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert tokens(next_tokens(logits, [Sampler(Sampling()), Sampler(Sampling())])) == [1, 0]


def tokens(draws: list[Draw]) -> list[int]:
    return [draw.token for draw in draws]


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


def test_bad_rows_are_told_apart_from_sound_ones() -> None:
    logits = torch.tensor([[1.0, math.nan], [0.0, 2.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    for sampling in (Sampling(), Sampling(temperature=1.0, top_k=1, logprobs=2)):
        found = draw_rows(logits, [Sampler(sampling) for _ in logits])
        assert [draw and draw.token for draw in found] == [None, 1, None, None]


def test_a_row_without_any_finite_logit_is_an_error() -> None:
    with pytest.raises(GenerationError):
        next_tokens(torch.full((1, 4), -math.inf), [Sampler(Sampling())])


def test_ruled_out_tokens_are_no_error() -> None:
    logits = torch.tensor([[-math.inf, 0.0]])
    assert tokens(next_tokens(logits, [Sampler(Sampling())])) == [1]
    hot = Sampler(Sampling(temperature=100.0, repetition_penalty=0.5, top_k=2), [0])
    assert tokens([draw for _ in range(99) for draw in next_tokens(logits, [hot])]) == [1] * 99


@pytest.mark.parametrize("temperature", [5e-324, 1e-9, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    assert set(draws(sampling, torch.tensor([-900.0, 900.0, 899.0]), 50)) == {1}


def test_a_seeded_row_draws_the_same_among_others() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    hot = {"temperature": 1.3, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    alone, among = Sampler(Sampling(seed=4, **hot)), Sampler(Sampling(seed=4, **hot))
    others = [Sampler(Sampling(seed=seed, **hot)) for seed in range(3)]
    greedy = [Sampler(Sampling()) for _ in range(3)]
    for _ in range(20):
        row = next_tokens(logits[3:4], [alone])[0]
        assert next_tokens(logits, [*others, among, *greedy])[3] == row
