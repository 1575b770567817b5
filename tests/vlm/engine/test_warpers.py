"""Reshaped distributions: the same as by transformers' own classes and its `generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.request import Request, Row
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampler, Sampling
from vlm.messages import user

NUM_TOKENS = 24


def theirs(logits: torch.Tensor, ids: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Probabilities (V,) by transformers' classes, in the order in which it applies them."""
    steps: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    history = torch.tensor([list(ids)], dtype=torch.long)
    return LogitsProcessorList(steps)(history, logits.double()[None])[0].softmax(dim=-1)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 12) | st.just(5000),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0) | st.just(0.0),
    repetition_penalty=st.floats(0.3, 3.0) | st.just(1.0),
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(samplings, st.integers(0, 2**32), st.sampled_from([1, 2, 7, 60, 3000]), st.data())
def test_probabilities_are_those_of_transformers(
    sampling: Sampling, seed: int, size: int, data: st.DataObject
) -> None:
    random = torch.Generator().manual_seed(seed)
    spread = data.draw(st.sampled_from([0.3, 1.0, 4.0]))
    logits = torch.randn(size, generator=random, dtype=torch.float64) * spread
    prompt = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    ours = Sampler(sampling, prompt).probabilities(logits)
    expected = theirs(logits, prompt, sampling)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_each_option_alone_keeps_the_set_worked_out_by_hand() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2]))

    def kept(**options: Any) -> set[int]:
        found = Sampler(Sampling(temperature=1.0, **options)).probabilities(logits)
        return set(found.nonzero().flatten().tolist())

    assert kept(top_k=1) == {1} and kept(top_k=3) == {1, 2, 3} and kept(top_k=9) == {0, 1, 2, 3}
    assert kept(min_p=0.76) == {1} and kept(min_p=0.74) == {1, 2} and kept(min_p=1.0) == {1}
    # of the two best alone, 4/7 would reach 0.55: top_p comes before min_p
    assert kept(top_p=0.55, min_p=0.74) == {1, 2}
    # of the three best, 4/9 and 3/9 reach 0.75 before the last one: top_k comes before top_p
    assert kept(top_k=3, top_p=0.75) == {1, 2} and kept(top_p=0.75) == {1, 2, 3}


def test_tokens_level_with_the_last_one_are_kept_too() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    found = Sampler(Sampling(temperature=1.0, top_k=2)).probabilities(logits)
    assert (found > 0).tolist() == [True, True, True, False]


def test_a_nucleus_of_very_many_tokens_is_whole() -> None:
    flat = torch.linspace(0, 1, 9000)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    torch.testing.assert_close(
        Sampler(sampling).probabilities(flat), theirs(flat, [], sampling), rtol=1e-9, atol=0
    )


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.3, 1.0, -2.0, 0.7, 0.1])
    sampler = Sampler(Sampling(temperature=1.5, top_k=4, seed=2))
    expected = sampler.probabilities(logits)
    found = torch.zeros(5)
    for _ in range(8000):
        found[sampler.pick(logits)] += 1 / 8000
    assert found[2] == 0 and (found - expected).abs().max() < 0.02


@pytest.mark.parametrize("drawn", [0.0, 1.0])
def test_the_ends_of_the_unit_interval_are_tokens_too(
    drawn: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 comes of rounding; no token that was left out may be taken then."""
    rand = torch.full((1,), drawn, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: rand)
    sampler = Sampler(Sampling(temperature=1.0))
    assert sampler.pick(torch.tensor([-torch.inf, 0.0, -torch.inf])) == 1


# Repetition penalty


def test_the_penalty_counts_what_was_drawn() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    logits = torch.tensor([4.0, 3.0, 2.5, -1.0])
    # 4/2 3 2.5 -1; then 2 3/2 2.5 -1; then 2 1.5 2.5/2 -1
    assert [sampler.pick(logits) for _ in range(4)] == [1, 2, 0, 0]
    lowered = Sampler(Sampling(repetition_penalty=2.0), [1])
    assert lowered.pick(torch.tensor([-1.9, -1.0])) == 0  # a negative logit is multiplied


def test_what_stands_for_a_picture_never_counts() -> None:
    logits = torch.tensor([4.0, 3.0, 2.5])
    sampler = Sampler(Sampling(repetition_penalty=10.0), [0, 0, 1], uncounted=[0])
    assert [sampler.pick(logits) for _ in range(3)] == [0, 0, 0]


def test_ids_beyond_the_head_are_passed_over() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [9, 1])
    assert sampler.pick(torch.tensor([1.0, 2.0])) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("warpers") / "tiny", seed=2)


def test_a_row_counts_its_prompt_and_not_its_picture(folder: Path) -> None:
    processor = load_checkpoint(folder)[1]
    prompt = processor.encode([user("a", testing.draw_image())], add_generation_prompt=True)
    row = Row(Request(prompt, Sampling(temperature=1.0, repetition_penalty=2.0)), processor)
    found = row.sampler.probabilities(torch.ones(270))
    usual = float(found.max())
    penalised = {token for token in range(270) if float(found[token]) < 0.9 * usual}
    assert processor.image_token_id in prompt.input_ids
    assert penalised == set(prompt.input_ids) - {processor.image_token_id}


def test_greedy_answers_with_a_penalty_are_those_of_transformers(folder: Path) -> None:
    engine = Engine(*load_checkpoint(folder))
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    answers = []
    for penalty in (1.0, 1.3, 3.0):
        sampling = Sampling(NUM_TOKENS, repetition_penalty=penalty)
        prompt = engine.processor.encode([user("what is this?")], add_generation_prompt=True)
        (ours,) = engine.generate([Request(prompt, sampling)])
        found = model.generate(
            torch.tensor([prompt.input_ids]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            repetition_penalty=penalty,
            suppress_tokens=[engine.processor.image_token_id],
        )
        ids = found[0, len(prompt.input_ids) :].tolist()
        ended = ids[-1] in engine.processor.eos_token_ids
        assert list(ours.ids) == (ids[:-1] if ended else ids)
        answers.append(ours.ids)
    assert len(set(answers)) == 3  # the penalty does something


def test_probabilities_are_those_of_generate_itself(folder: Path) -> None:
    """The oracle decides the order, and what of prompt and answer counts as repeated."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    prompt = AutoTokenizer.from_pretrained(folder)("what is this?", return_tensors="pt").input_ids
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model.generate(
            prompt,
            do_sample=True,
            max_new_tokens=NUM_TOKENS,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    kept = set()
    for step, (logits, scores) in enumerate(zip(found.logits, found.scores, strict=True)):
        before = found.sequences[0, : prompt.shape[1] + step].tolist()
        ours = Sampler(Sampling(**options), before).probabilities(logits[0])
        expected = scores[0].double().softmax(dim=-1)
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)
        kept.add(int((ours > 0).sum()))
    assert len(kept) > 3 and min(kept) > 1
