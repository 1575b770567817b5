"""A row that runs alone: slices instead of indices, and keys and values that change hands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.lean import LeanDecoder, lean_decoder
from vlm.engine.prefixes import PrefixStore
from vlm.engine.request import Request
from vlm.engine.rotary import RotaryTable
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.engine.slots import Segment, SlotCache, Step
from vlm.errors import GenerationError
from vlm.messages import user
from vlm.processor import Encoded

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 2.0},
}


def rotary(kind: str) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **ROPES[kind]}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=parameters,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("kind", sorted(ROPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_holds_what_the_decoder_computes(kind: str, dtype: torch.dtype) -> None:
    table, like = RotaryTable(rotary(kind)), torch.zeros(1, dtype=dtype)
    reference = rotary(kind)  # one, as some kinds remember the longest sequence
    wanted: list[Any] = [[3], range(5, 9), [7, 700, 2, 0], range(40, 90), [1500]]
    for positions in wanted:
        expected = reference(like, torch.tensor([list(positions)]))
        for got, whole in zip(table.at(positions, like), expected, strict=True):
            assert got.dtype == dtype and torch.equal(got[:, 0], whole[0])


def test_the_table_follows_the_type_of_the_states() -> None:
    table = RotaryTable(rotary("default"))
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert table.at([3], torch.zeros(1, dtype=dtype))[0].dtype == dtype


def decoders() -> Iterator[Any]:
    small: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "initializer_range": 0.3,
    }
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    torch.manual_seed(0)
    yield LlamaModel(LlamaConfig(**small))
    yield Qwen2Model(Qwen2Config(**small, **windows))
    yield LlamaModel(LlamaConfig(**{**small, "num_key_value_heads": 4, "attention_bias": True}))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_alone_gives_the_decoders_own_states(number: int, packed: bool) -> None:
    """By pieces: a prompt, a longer one on top of it, and single tokens."""
    decoder = list(decoders())[number].eval()
    lean = lean_decoder(decoder)
    assert lean is not None
    if packed:
        assert len(lean.arrange(torch.nn.Linear(64, 8), copies=True)) == 3 * 7
    with torch.inference_mode():
        by_pieces(lean, decoder)


def by_pieces(lean: LeanDecoder, decoder: Any) -> None:
    tokens = torch.randn(1, 24, 64)
    expected = decoder(inputs_embeds=tokens, use_cache=False).last_hidden_state[0]
    cache, done = SlotCache(), 0
    for size in (7, 9, 1, 1, 4, 1, 1):
        cache.reserve(1, done + size)
        step = Step([done], []) if size == 1 else Step([], [Segment(0, done, size)])
        states = lean(tokens[:, done : done + size], step, cache)
        done += size
        torch.testing.assert_close(states[0], expected[done - 1], atol=2e-5, rtol=2e-5)
    assert done == 24


# Keys and values that change hands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("alone"), "qwen2", 1)


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(*load_checkpoint(folder))


def longer(engine: Engine, text: str, before: list[int] | None = None, tokens: int = 40) -> Request:
    """A prompt that goes on from ids, to be kept."""
    opening = engine.processor.encode([user("hi")], add_generation_prompt=True).input_ids
    ids = list(before or opening)
    ids += engine.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = Encoded(ids, [False] * len(ids), [])
    return Request(prompt, Sampling(max_new_tokens=tokens, stop_loops=False), keep=True)


def answered(engine: Engine, request: Request) -> list[int]:
    """The ids of the prompt and of its answer."""
    (completion,) = engine.generate([request])
    return [*request.prompt.input_ids, *completion.ids]


def fresh(engine: Engine, request: Request) -> list[int]:
    """As `answered`, from nothing."""
    return answered(Engine(engine.model, engine.processor), request)


def kept(engine: Engine) -> list[tuple[np.ndarray, list[torch.Tensor]]]:
    return [
        (entry.tokens.copy(), [t.clone() for pair in entry.layers for t in pair])
        for entry in engine.prefixes._entries.values()
    ]


@contextmanager
def nothing_kept_changes(engine: Engine) -> Iterator[None]:
    before = kept(engine)
    entries = list(engine.prefixes._entries.values())
    yield
    for (_, values), entry in zip(before, entries, strict=True):
        now = [t for pair in entry.layers for t in pair]
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))


def test_the_next_turn_runs_where_the_last_one_lies(engine: Engine) -> None:
    ids = answered(engine, longer(engine, "what is it, and what is it not?"))
    (entry,) = engine.prefixes._entries.values()
    place = entry.layers[0][0].data_ptr()
    request = longer(engine, "why?", ids, tokens=2)
    with nothing_kept_changes(engine):
        assert answered(engine, request) == fresh(engine, request)
    (entry,) = engine.prefixes._entries.values()
    assert entry.layers[0][0].data_ptr() == place
    assert len(entry.tokens) == len(request.prompt.input_ids) + 1  # the last token is not computed


def test_rows_that_join_and_other_branches_leave_it_alone(engine: Engine) -> None:
    ids = answered(engine, longer(engine, "what is it, and what is it not?"))
    branches = [longer(engine, text, ids, tokens=9) for text in ("why?", "no", "and when?")]
    expected = [fresh(engine, branch) for branch in branches]
    with nothing_kept_changes(engine):
        first, *others = (engine.submit([branch])[0] for branch in branches[:1])
        engine.step()
        others = engine.submit(branches[1:])  # while the first runs where the kept row lies
        while engine.step():
            pass
    got = [[*t.request.prompt.input_ids, *t.result().ids] for t in (first, *others)]
    assert got == expected
    with nothing_kept_changes(engine):
        assert [answered(engine, branch) for branch in branches] == expected


def test_two_engines_with_one_store_do_not_write_over_each_other(engine: Engine) -> None:
    ids = answered(engine, longer(engine, "what is it, and what is it not?"))
    other = Engine(engine.model, engine.processor, engine.identity, prefixes=engine.prefixes)
    requests = [longer(engine, text, ids, tokens=9) for text in ("why?", "no")]
    expected = [fresh(engine, request) for request in requests]
    first, second = engine.submit(requests[:1])[0], other.submit(requests[1:])[0]
    for _ in range(9):
        engine.step()
        other.step()
    got = [[*t.request.prompt.input_ids, *t.result().ids] for t in (first, second)]
    assert got == expected


@pytest.mark.parametrize("failure", ["numbers", "error"])
def test_a_turn_that_fails_leaves_the_turns_before_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    ids = answered(engine, longer(engine, "what is it, and what is it not?"))
    request = longer(engine, "why?", ids, tokens=9)
    expected = fresh(engine, request)

    def bad(hidden: torch.Tensor) -> torch.Tensor:
        if failure == "error":
            raise GenerationError("from the model")
        return torch.full((len(hidden), 300), torch.nan)

    with nothing_kept_changes(engine):
        monkeypatch.setattr(engine.model, "logits", bad)
        with pytest.raises(GenerationError):
            engine.generate([request])
        monkeypatch.undo()
        assert answered(engine, longer(engine, "something else", tokens=3))
        assert answered(engine, request) == expected


def test_what_lies_behind_a_row_is_taken_once_and_counted() -> None:
    cache, store = SlotCache(), PrefixStore()
    cache.reserve(1, 100)
    states = torch.randn(1, 2, 100, 4)
    cache.start_layer(0, states, states)
    cache.write(0, 0, states[0].transpose(0, 1), states[0].transpose(0, 1))
    tokens = np.arange(100)
    store.keep(tokens, cache.hand_over(0, 100))
    assert not cache.keys and not cache.single
    assert store.nbytes == 2 * 2 * 128 * 4 * 4  # keys and values, 128 positions of 2 heads
    entry = store.match(tokens)[1]
    assert entry is not None
    assert torch.equal(entry.layers[0][0], states[0])
    assert store.claim(entry) and not store.claim(entry)
    cache.reserve(1, 110)
    cache.take_over(entry.layers, 110)
    assert cache.keys[0].shape == (1, 2, 128, 4) and cache.single
    cache.reserve(1, 128)
    assert cache.keys[0].data_ptr() == entry.layers[0][0].data_ptr()
    cache.reserve(1, 129)
    assert cache.keys[0].data_ptr() != entry.layers[0][0].data_ptr()
    assert torch.equal(cache.keys[0][0, :, :100], states[0])


def test_a_short_row_in_much_room_is_copied() -> None:
    cache = SlotCache()
    cache.reserve(1, 10)
    states = torch.randn(1, 2, 10, 4)
    cache.start_layer(0, states, states)
    row = cache.hand_over(0, 10)
    assert row[0][0].untyped_storage().nbytes() == 2 * 10 * 4 * 4
    assert cache.single and len(cache.keys) == 1
