"""Logprobs: of the model's own distribution, whatever the sampling, and at no extra price."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.request import Completion, Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampler, Sampling, next_tokens
from vlm.messages import user

SETTINGS = [
    Sampling(),
    Sampling(logprobs=0),
    Sampling(logprobs=3),
    Sampling(temperature=2.0, seed=1),
    Sampling(temperature=0.7, top_k=2, min_p=0.3, top_p=0.8, logprobs=20, seed=1),
    Sampling(repetition_penalty=3.0, logprobs=1),
]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 40), st.permutations(SETTINGS))
def test_logprobs_are_the_log_softmax_of_the_logits(
    seed: int, size: int, samplings: list[Sampling]
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(samplings), size, generator=random) * 5
    expected = logits.double().log_softmax(dim=-1)
    found = next_tokens(logits, [Sampler(each, [0, 0]) for each in samplings])
    for row, (sampling, draw) in enumerate(zip(samplings, found, strict=True)):
        assert draw.logprob == pytest.approx(float(expected[row, draw.token]), abs=1e-5)
        assert draw.logprob <= 0
        number = min(sampling.logprobs or 0, size)
        best = expected[row].sort(descending=True)
        assert [token for token, _ in draw.likeliest] == best.indices[:number].tolist()
        assert [value for _, value in draw.likeliest] == pytest.approx(
            best.values[:number].tolist(), abs=1e-5
        )


def test_tokens_that_are_ruled_out_are_never_reported() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.0, -math.inf]])
    (draw,) = next_tokens(logits, [Sampler(Sampling(logprobs=20))])
    assert [token for token, _ in draw.likeliest] == [0, 2]
    assert draw.logprob == pytest.approx(-math.log(1 + math.exp(-1)))
    assert draw.likeliest[0] == (0, draw.logprob)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_reckoned_in_single_precision(dtype: torch.dtype) -> None:
    logits = torch.linspace(-3, 3, 5000).to(dtype)[None]
    expected = float(logits.double().log_softmax(dim=-1).max())
    (draw,) = next_tokens(logits, [Sampler(Sampling())])
    assert draw.logprob == pytest.approx(expected, abs=1e-4)


def test_plain_rows_are_not_copied_for_their_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "pick", lambda *_: pytest.fail("a row was looked at alone"))
    next_tokens(torch.zeros(3, 9), [Sampler(Sampling(logprobs=2)) for _ in range(3)])


# The engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("logprobs") / "tiny", seed=1)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*load_checkpoint(folder))


def request(engine: Engine, text: str = "what?", **sampling: Any) -> Request:
    prompt = engine.processor.encode([user(text)], add_generation_prompt=True)
    return Request(prompt, Sampling(**{"max_new_tokens": 12, **sampling}))


def theirs(folder: Path, asked: Request, completion: Completion, image_token: int) -> torch.Tensor:
    """Logprobs (answer, V) by one pass of transformers over prompt and answer."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = [*asked.prompt.input_ids, *completion.ids]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, len(asked.prompt.input_ids) - 1 : -1]
    return logits.index_fill(1, torch.tensor(image_token), -torch.inf).log_softmax(dim=-1)


def test_logprobs_are_those_of_one_pass_of_transformers(folder: Path, engine: Engine) -> None:
    asked = [
        request(engine),
        request(engine, "and the other?", logprobs=2),
        request(engine, temperature=1.5, seed=3, logprobs=0),
        request(engine, repetition_penalty=1.5),
    ]
    for each, completion in zip(asked, engine.generate(asked), strict=True):
        expected = theirs(folder, each, completion, engine.processor.image_token_id)
        chosen = expected[range(len(completion.ids)), list(completion.ids)]
        assert completion.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
        number = each.sampling.logprobs
        if number is None:
            assert completion.top_logprobs is None
            continue
        assert completion.top_logprobs is not None
        assert [len(pairs) for pairs in completion.top_logprobs] == [number] * len(completion.ids)
        for pairs, row in zip(completion.top_logprobs, expected, strict=True):
            best = row.topk(number)
            assert [token for token, _ in pairs] == best.indices.tolist()
            assert [v for _, v in pairs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_asking_for_logprobs_changes_no_token(engine: Engine) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 5}):
        plain, told = engine.generate(
            [request(engine, **options), request(engine, logprobs=5, **options)]
        )
        assert plain.ids == told.ids and plain.logprobs == pytest.approx(told.logprobs, abs=1e-4)


def test_the_token_that_ends_an_answer_does_not_count(engine: Engine) -> None:
    (whole,) = engine.generate([request(engine, logprobs=1)])
    engine.processor.eos_token_ids |= {whole.ids[5]}
    try:
        (ended,) = engine.generate([request(engine, logprobs=1)])
    finally:
        engine.processor.eos_token_ids -= {whole.ids[5]}
    number = whole.ids.index(whole.ids[5])
    assert ended.finish_reason == "stop"
    assert len(ended.ids) == len(ended.logprobs) == len(ended.top_logprobs or ()) == number
    assert ended.logprobs == pytest.approx(whole.logprobs[:number], abs=1e-4)
