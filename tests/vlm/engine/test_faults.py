"""What goes wrong inside the model: one answer fails at most, and the engine goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import GenerationError
from vlm.messages import assistant, user

TEXTS = ("what is this?", "and what about this one, which is longer?", "x", "one more")
LONGEST = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("faults") / "tiny", "qwen2", 1)


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(*load_checkpoint(folder))


def requests(engine: Engine) -> list[Request]:
    chats = [[user(text, testing.draw_image(seed=seed))] for seed, text in enumerate(TEXTS)]
    prompts = [engine.processor.encode(chat, add_generation_prompt=True) for chat in chats]
    return [Request(prompt, Sampling(12)) for prompt in prompts]


def answers(engine: Engine) -> list[tuple[int, ...]]:
    return [completion.ids for completion in engine.generate(requests(engine))]


def fail_at(call: int, error: Exception, compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which raises the `call`-th time."""
    calls = 0

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return compute(*given)

    return failing


@pytest.mark.parametrize("part", ["embed", "encode_images", "logits"])
def test_memory_that_ends_in_a_prefill_costs_no_answer(
    engine: Engine, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(Engine(engine.model, engine.processor))
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(engine.model, part, fail_at(1, error, getattr(engine.model, part)))
    assert answers(engine) == expected  # half of them waited for the other half


@pytest.mark.parametrize("part", ["logits", "draw"])
def test_memory_that_ends_in_a_decode_costs_the_longest_answer_alone(
    engine: Engine, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(Engine(engine.model, engine.processor))
    error = torch.OutOfMemoryError("CUDA out of memory")
    owner, name = (engine.model, "logits") if part == "logits" else (engine, "_draw")
    monkeypatch.setattr(owner, name, fail_at(5, error, getattr(owner, name)))
    tasks = engine.submit(requests(engine))
    while engine.step():
        pass
    with pytest.raises(GenerationError, match=r"out of memory .*smaller batch"):
        tasks[LONGEST].result()
    for place, task in enumerate(tasks):
        if place != LONGEST:
            assert task.result().ids == expected[place]
    assert answers(engine) == expected


def test_without_memory_to_keep_a_row_it_is_answered_all_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(Engine(engine.model, engine.processor))

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._slots, "copy_out", full)
    keeping = [replace(request, keep=True) for request in requests(engine)]
    assert [completion.ids for completion in engine.generate(keeping)] == expected
    assert engine.prefixes.match(engine.submit(keeping[:1])[0].tokens)[1] is None


def test_everyone_who_waits_hears_of_an_error_and_the_next_is_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread takes the step for all; the others must not wait for ever."""
    expected = answers(engine)
    told: list[str] = []

    def wait(request: Request) -> None:
        try:
            engine.generate([request])
        except RuntimeError as error:
            told.append(str(error))

    error = RuntimeError("a kernel failed")
    monkeypatch.setattr(engine.model, "logits", fail_at(1, error, engine.model.logits))
    threads = [threading.Thread(target=wait, args=(each,)) for each in requests(engine)]
    with engine.lock:  # so that all of them have asked before the first step
        for thread in threads:
            thread.start()
        while len(engine.lock._waiting) < len(threads):
            time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=60)
    assert told == ["a kernel failed"] * len(threads)
    assert answers(engine) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_overflow_in_the_middle_of_a_stream_is_an_error(
    engine: Engine, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = engine.model.logits, 0

    def overflown(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return compute(hidden) if calls < 4 else torch.full_like(compute(hidden), value)

    monkeypatch.setattr(engine.model, "logits", overflown)
    steps = engine.stream(requests(engine)[0])
    assert [len(next(steps).ids) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(GenerationError, match="NaN"):
        next(steps)
    monkeypatch.undo()
    assert len(engine.generate(requests(engine)[:1])[0].ids) > 3


def test_an_end_at_once_is_an_empty_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, (end, *_) = engine.model.logits, engine.processor.eos_token_ids

    def ended(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        logits[..., end] = 1e4
        return logits

    monkeypatch.setattr(engine.model, "logits", ended)
    for found in engine.generate(requests(engine)):
        assert (found.ids, found.finish_reason) == ((), "stop")


def test_a_picture_twice_in_one_chat_is_encoded_once_and_shown_twice(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    encode = engine.model.encode_images

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(engine.model, "encode_images", counted)
    picture = testing.draw_image(seed=3)
    chat = [user("a", picture), assistant("b"), user("c", picture, testing.draw_image(seed=3))]
    prompt = engine.processor.encode(chat, add_generation_prompt=True)
    image = engine.processor.image_token_id
    assert prompt.input_ids.count(image) == 3 * testing.NUM_VISUAL_TOKENS
    engine.generate([Request(prompt, Sampling(2))])
    assert counts == [1]
