"""Compiled decode steps: the same tokens, few shapes, and a way out where they fail."""

import logging
from pathlib import Path

import pytest
import torch

from vlm import testing
from vlm.checkpoint import compose
from vlm.engine.compiled import LEAST_POSITIONS, CompiledDecoder, StaticSlotCache
from vlm.engine.lean import LeanDecoder
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import ConfigError
from vlm.messages import assistant, user
from vlm.opening import open_parts


def engines(folder: Path, language: testing.Language, backend: str) -> tuple[Engine, Engine]:
    """A plain engine and one that compiles, of one model."""
    vision = testing.tiny_vision_folder(folder / "v")
    model, processor = compose(vision, testing.tiny_language_folder(folder / "l", language))
    plain, compiled = Engine(model, processor), Engine(model, processor, compile=True)
    assert isinstance(compiled._decode, CompiledDecoder)
    compiled._decode = CompiledDecoder(compiled._decode.lean, backend)
    return plain, compiled


def ask(engine: Engine, number: int, **sampling: object) -> Request:
    picture = testing.draw_image((40, 40), seed=number)
    prompt = engine.processor.encode([user("what is it? " * (1 + number % 3), picture)])
    return Request(prompt, Sampling(max_new_tokens=8 + 5 * number, stop_loops=False, **sampling))


def ids(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    return [tuple(done.ids) for done in engine.generate(requests)]


def shapes(engine: Engine) -> set[tuple[int, int]]:
    assert isinstance(engine._decode, CompiledDecoder)
    return set(engine._decode.seconds)


@pytest.mark.parametrize("language", ["llama", "qwen2", "qwen3"])
def test_compiled_steps_give_the_same_tokens(tmp_path: Path, language: testing.Language) -> None:
    plain, compiled = engines(tmp_path, language, "aot_eager")
    requests = [ask(plain, number, temperature=1.0, seed=number) for number in range(6)]
    expected = ids(plain, requests)
    assert len({token for row in expected for token in row}) > 12  # and not one token repeated
    assert ids(compiled, requests) == expected
    assert shapes(compiled) == {(8, LEAST_POSITIONS)}  # six rows, that end one after the other


def test_a_row_by_itself_and_more_rows_than_before(tmp_path: Path) -> None:
    plain, compiled = engines(tmp_path, "llama", "eager")
    requests = [ask(plain, number) for number in range(5)]
    alone = [ids(compiled, [request])[0] for request in requests]
    assert shapes(compiled) == {(1, LEAST_POSITIONS)}
    assert ids(compiled, requests) == alone == ids(plain, requests)
    assert shapes(compiled) == {(1, LEAST_POSITIONS), (8, LEAST_POSITIONS)}


def test_an_answer_that_outgrows_its_memory(tmp_path: Path) -> None:
    plain, compiled = engines(tmp_path, "llama", "eager")
    prompt = plain.processor.encode([user("x" * 60)])
    assert len(prompt.input_ids) < LEAST_POSITIONS
    never = dict.fromkeys(range(len(testing.SPECIAL_TOKENS)), -100.0)
    sampling = Sampling(max_new_tokens=120, stop_loops=False, logit_bias=never)
    expected = ids(plain, [Request(prompt, sampling)])
    assert len(expected[0]) == 120
    assert ids(compiled, [Request(prompt, sampling)]) == expected
    assert shapes(compiled) == {(1, LEAST_POSITIONS), (1, 2 * LEAST_POSITIONS)}


def test_kept_turns_go_on_from_what_compiled_steps_wrote(tmp_path: Path) -> None:
    plain, compiled = engines(tmp_path, "qwen2", "eager")
    picture = testing.draw_image((40, 40), seed=1)
    chat = [user("what is it?", picture)]
    for question in ("and then?", "why?"):
        rows = []
        for engine in (plain, compiled):
            request = Request(engine.processor.encode(chat), Sampling(max_new_tokens=12), keep=True)
            *_, last = engine.stream(request)
            rows.append(list(last.ids))
        assert rows[0] == rows[1]
        answer = plain.processor.decode(rows[0])
        chat = [*chat, assistant(answer or "yes"), user(question)]
    assert len(compiled.prefixes) > 0


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, compiled = engines(tmp_path, "llama", "eager")
    assert isinstance(compiled._decode, CompiledDecoder)

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("no compiler\nand a long trace")

    compiled._decode._compiled = refuse
    requests = [ask(plain, number) for number in range(3)]
    with caplog.at_level(logging.WARNING):
        assert ids(compiled, requests) == ids(plain, requests)
    (told,) = [r.getMessage() for r in caplog.records if r.name == "vlm.engine.compiled"]
    assert "(4, 256)" in told and "no compiler" in told and "long trace" not in told


def test_other_families_run_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    parts = compose(vision, testing.tiny_language_folder(tmp_path / "l", "gemma2"))
    engine = Engine(*parts, compile=True)
    assert not isinstance(engine._decode, CompiledDecoder | LeanDecoder)
    assert caplog.text.count("it runs uncompiled") == 1
    requests = [ask(engine, number) for number in range(2)]
    assert ids(engine, requests) == ids(Engine(*parts), requests)


def test_inductor_where_there_is_a_compiler(tmp_path: Path) -> None:
    """The default: compiled, or the way out that the log tells of; the tokens are the same."""
    plain, compiled = engines(tmp_path, "llama", "inductor")
    requests = [ask(plain, number, temperature=1.0, seed=number) for number in range(2)]
    assert ids(compiled, requests) == ids(plain, requests)


def test_static_memory_recurs_in_shape() -> None:
    cache = StaticSlotCache()
    cache.reserve(5, 300)
    assert cache.shape == (8, 512)
    cache.reserve(3, 100)
    cache.release()
    assert cache.shape == (8, 512) and not cache.single


def test_a_model_of_another_kind_is_not_compiled(tmp_path: Path) -> None:
    folder = testing.tiny_language_folder(tmp_path)
    with pytest.raises(ConfigError, match="compile=True is for LLaVA folders"):
        open_parts(folder, "cpu", "auto", None, compile=True)
