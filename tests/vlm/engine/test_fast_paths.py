"""Packed weights and lean layers: used where they give the same numbers, and only there."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint
from vlm.engine.decoders import Recompute, SlotDecoder
from vlm.engine.lean import LeanDecoder
from vlm.engine.packed import pack_linears, unpack_linears
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import GenerationError
from vlm.messages import user

LEAN = {"llama", "qwen2", "qwen3"}  # and Mistral, without a sliding window
QUESTIONS = ["what is it?", "x", "why is the thing over there of that colour, and since when?"]


@pytest.mark.parametrize("language", get_args(testing.Language))
def test_lean_layers_serve_the_llama_family_alone(
    tmp_path: Path, language: testing.Language
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", language)
    engine = Engine(*compose(vision, text))
    assert isinstance(engine._decode, LeanDecoder if language in LEAN else SlotDecoder)


@pytest.mark.parametrize("language", sorted(LEAN))
def test_lean_answers_are_the_decoders_own(tmp_path: Path, language: testing.Language) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", language)
    model, processor = compose(vision, text)
    lean, plain = Engine(model, processor), Engine(model, processor)
    plain._decode = SlotDecoder(model.language_model.get_decoder())
    batch = [ask(lean, i) for i in range(6)]
    assert ids(lean.generate(batch)) == ids(plain.generate(batch))


def test_mistral_without_a_window_runs_lean(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", "mistral")
    raw = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**raw, "sliding_window": None}))
    assert isinstance(Engine(*compose(vision, text))._decode, LeanDecoder)


def test_a_decoder_that_does_more_is_not_run_lean(tmp_path: Path) -> None:
    """The structure is Llama's, the numbers are not: the trial must notice."""
    model, processor = load_checkpoint(testing.tiny_llava_folder(tmp_path))
    mlp = model.language_model.model.layers[1].mlp
    compute = mlp.forward
    mlp.forward = lambda states: 1.01 * compute(states)
    assert isinstance(Engine(model, processor)._decode, SlotDecoder)


def test_a_decoder_with_an_attention_of_its_own_is_recomputed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_checkpoint(testing.tiny_llava_folder(tmp_path))
    reference = Engine(model, processor)
    requests = [ask(reference, i) for i in range(4)]
    expected = ids(reference.generate(requests))
    monkeypatch.setattr("vlm.engine.decoders.lean_decoder", lambda decoder: None)
    monkeypatch.setattr("vlm.engine.decoders.SlotDecoder", lambda decoder: None)
    engine = Engine(model, processor)
    assert isinstance(engine._decode, Recompute)
    assert caplog.text.count("does not use transformers' attention interface") == 1
    assert ids(engine.generate(requests)) == expected
    kept = [replace(request, keep=True) for request in requests]
    assert ids(engine.generate(kept)) == expected == ids(engine.generate(kept))


def test_packed_layers_compute_the_same_and_can_be_unpacked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 700), nn.Linear(700, 40, bias=False))
    rows = torch.randn(5, 3, 96)
    expected = model(rows)
    assert pack_linears(model) == 2 and pack_linears(model) == 0
    with torch.inference_mode():
        got = model(rows)
        single = model(rows[0, 0])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single, expected[0, 0], atol=1e-5, rtol=1e-5)
    model(rows).sum().backward()  # gradients still flow, by the plain product
    assert model[0].weight.grad is not None
    unpack_linears(model)
    assert all("forward" not in vars(layer) for layer in model)
    assert torch.equal(F.linear(rows, model[0].weight, model[0].bias), model[0](rows))


def test_bfloat16_is_packed_and_float64_left_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).bfloat16()
    rows = torch.randn(5, 64).bfloat16()
    expected = layer(rows)
    assert pack_linears(layer) in (0, 1)  # not every CPU has the kernels
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows), expected, atol=2e-2, rtol=2e-2)
    assert pack_linears(nn.Linear(8, 8).double()) == 0


# Schedules


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = testing.tiny_llava_folder(tmp_path_factory.mktemp("m"), "qwen2", 5)
    return Engine(*load_checkpoint(folder))


def ask(engine: Engine, number: int, length: int = 12) -> Request:
    pictures = [testing.draw_image(seed=seed) for seed in range(number % 3)]
    text = QUESTIONS[number % len(QUESTIONS)] + str(number)
    prompt = engine.processor.encode([user(text, *pictures)], add_generation_prompt=True)
    return Request(prompt, Sampling(max_new_tokens=length, stop_loops=False))


def ids(completions: Iterable[object]) -> list[tuple[int, ...]]:
    return [completion.ids for completion in completions]  # type: ignore[attr-defined]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 14)), min_size=1, max_size=9),
    arrivals=st.lists(st.integers(0, 6), min_size=9, max_size=9),
    places=st.integers(1, 5),
    tokens=st.integers(1, 200),
    cancelled=st.sets(st.integers(0, 8), max_size=3),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    engine: Engine,
    jobs: list[tuple[int, int]],
    arrivals: list[int],
    places: int,
    tokens: int,
    cancelled: set[int],
) -> None:
    requests = [ask(engine, number, length) for number, length in jobs]
    alone = [engine.generate([request])[0].ids for request in requests]
    scheduler = engine.scheduler
    before = scheduler.max_running, scheduler.max_step_tokens
    scheduler.max_running, scheduler.max_step_tokens = places, tokens
    try:
        tasks = []
        for request, steps in zip(requests, arrivals, strict=False):
            tasks += engine.submit([request])
            for _ in range(steps):
                engine.step()
            if len(tasks) - 1 in cancelled:
                tasks[-1].finish_reason = tasks[-1].finish_reason or "cancelled"
        while engine.step():
            pass
    finally:
        scheduler.max_running, scheduler.max_step_tokens = before
    for i, (task, expected) in enumerate(zip(tasks, alone, strict=True)):
        got = task.result().ids
        assert got == (expected[: len(got)] if i in cancelled else expected)


def test_any_number_of_requests_is_answered_in_order(engine: Engine) -> None:
    taken: list[int] = []

    def source() -> Iterator[Request]:
        for number in range(50):
            taken.append(number)
            yield ask(engine, number, 1 + number % 7)

    expected = [engine.generate([ask(engine, n, 1 + n % 7)])[0].ids for n in range(50)]
    engine.scheduler.max_running = 4
    answers = engine.generate_all(source())
    assert next(answers).ids == expected[0]
    assert len(taken) <= 1 + 3 * 4 + 2  # those at the model, those waiting, one in hand
    assert ids(answers) == expected[1:]
    engine.scheduler.max_running = 32


def test_what_all_prompts_begin_with_is_computed_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(engine, number, 4) for number in range(9)]
    engine.prefixes.clear()
    expected = [engine.generate([request])[0].ids for request in requests]
    sizes: list[int] = []
    embed = engine.model.embed

    def counted(tokens: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        sizes.append(tokens.numel())
        return embed(tokens, features)

    monkeypatch.setattr(engine.model, "embed", counted)
    monkeypatch.setattr(engine.scheduler, "max_running", 3)
    assert ids(engine.generate(requests)) == expected
    lengths = [len(request.prompt.input_ids) for request in requests]
    system = "A chat between a curious human and"  # Vicuna's prompt, a token a byte nearly
    assert sum(sizes) < sum(lengths) - 5 * len(system)
    engine.prefixes.clear()


def test_an_error_in_the_source_comes_after_what_was_before_it(engine: Engine) -> None:
    def source() -> Iterator[Request]:
        yield ask(engine, 1, 3)
        yield ask(engine, 2, 3)
        raise GenerationError("from the source")

    answers = engine.generate_all(source())
    assert len(ids([next(answers), next(answers)])) == 2
    with pytest.raises(GenerationError, match="from the source"):
        next(answers)


def test_a_deadline_ends_an_answer_as_it_is(engine: Engine) -> None:
    request = replace(ask(engine, 1, 100), deadline=0.0)
    (found,) = engine.generate([request])
    assert found.finish_reason == "deadline" and found.ids == ()


def test_out_of_memory_halves_what_starts_and_ends_one_row_at_most(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(engine, number, 5) for number in range(6)]
    expected = ids(engine.generate(requests))
    forward = engine._forward

    def scarce(step: object, old: list[object], new: list[object]) -> torch.Tensor:
        if len(new) > 2:
            raise torch.OutOfMemoryError("no memory for more than two")
        return forward(step, old, new)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_forward", scarce)
    assert ids(engine.generate(requests)) == expected

    def none(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(engine, "_forward", none)
    with pytest.raises(GenerationError, match="out of memory for a prompt of"):
        engine.generate(requests[:1])
    monkeypatch.undo()
    engine.scheduler.max_step_tokens = 8192
    assert ids(engine.generate(requests)) == expected
