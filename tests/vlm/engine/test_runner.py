"""The engine's promises: batched = alone = transformers, at once stopped, cached = computed."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.cache import FeatureCache
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import ContextLengthError, GenerationError
from vlm.messages import user
from vlm.model import VisionLanguageModel

LANGUAGES: list[testing.Language] = ["llama", "qwen2"]
PROMPTS: list[tuple[str, tuple[int, ...]]] = [  # question, seeds of its pictures
    ("what is this?", (1,)),
    ("hello there, no picture at all this time", ()),
    ("and now two: which of them has more blue in it, first or second?", (2, 3)),
    ("x", (1,)),
    ("y", ()),
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    return {kind: talkative(testing.tiny_llava_folder(root / kind, kind, 1)) for kind in LANGUAGES}


def talkative(folder: Path) -> Path:
    """Sharpen attention, so that answers vary: equal repetitions would prove little."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in state:
        if "language_model" in name and "q_proj.weight" in name:
            state[name] *= 9
    save_file(state, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def engine(folders: dict[str, Path]) -> Engine:
    return Engine(*load_checkpoint(folders["llama"]))


def request(
    engine: Engine,
    text: str = "what is this?",
    seeds: tuple[int, ...] = (1,),
    stop: threading.Event | None = None,
    **sampling: Any,
) -> Request:
    sampling.setdefault("max_new_tokens", NUM_TOKENS)
    pictures = [testing.draw_image(seed=seed) for seed in seeds]
    prompt = engine.processor.encode([user(text, *pictures)], add_generation_prompt=True)
    return Request(prompt, Sampling(**sampling), stop)


def requests(engine: Engine, **sampling: Any) -> list[Request]:
    return [request(engine, text, seeds, **sampling) for text, seeds in PROMPTS]


def ids_of(engine: Engine, batch: list[Request]) -> list[tuple[int, ...]]:
    return [completion.ids for completion in engine.generate(batch)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_batch_gives_what_its_rows_give_alone(folders: dict[str, Path], language: str) -> None:
    engine = Engine(*load_checkpoint(folders[language]))
    batch = requests(engine)
    together = ids_of(engine, batch)
    assert together == [ids_of(engine, [row])[0] for row in batch]
    assert together[::-1] == ids_of(engine, batch[::-1])
    assert len(set(together)) == len(together)
    assert all(len(set(ids)) > 10 for ids in together)


@pytest.mark.parametrize("language", LANGUAGES)
def test_greedy_tokens_are_those_of_transformers(folders: dict[str, Path], language: str) -> None:
    folder = folders[language]
    engine = Engine(*load_checkpoint(folder))
    ours = engine.generate(requests(engine))
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    for (text, seeds), completion in zip(PROMPTS, ours, strict=True):
        parts = [{"type": "image"}] * len(seeds) + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": parts}]
        pictures = [testing.draw_image(seed=seed) for seed in seeds] or None
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=prompt, images=pictures, return_tensors="pt")
        found = model.generate(
            **inputs,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            suppress_tokens=[engine.processor.image_token_id],
        )
        theirs = found[0, inputs["input_ids"].shape[1] :].tolist()
        ended = theirs[-1] in engine.processor.eos_token_ids
        assert completion.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert list(completion.ids) == (theirs[:-1] if ended else theirs)
        assert completion.finish_reason == ("stop" if ended else "length")


def force(model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change(logits, step)` edit the logits of every forward; prefill is step 0."""
    compute = model.logits
    steps = iter(range(1000))

    def edited(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        change(logits, next(steps))
        return logits

    monkeypatch.setattr(model, "logits", edited)


def test_a_row_that_ends_leaves_the_batch_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [ids_of(engine, [row])[0] for row in requests(engine)]
    eos = min(engine.processor.eos_token_ids)
    widths: list[int] = []

    def end_second_row(logits: torch.Tensor, step: int) -> None:
        widths.append(len(logits))
        if step == 3:
            logits[1, eos] = 1e4

    force(engine.model, monkeypatch, end_second_row)
    batch = requests(engine)
    found = engine.generate(batch)
    assert widths == [5] * 4 + [4] * (NUM_TOKENS - 4)
    assert found[1].ids == alone[1][:3] and found[1].finish_reason == "stop"
    for row in (0, 2, 3, 4):
        assert found[row].ids == alone[row] and found[row].finish_reason == "length"


def test_logits_are_computed_at_the_last_position_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    force(engine.model, monkeypatch, lambda logits, _: shapes.append(tuple(logits.shape)))
    engine.generate([request(engine)])
    assert shapes == [(1, 270)] * NUM_TOKENS


def test_max_new_tokens_is_exact_and_per_row(engine: Engine) -> None:
    batch = [request(engine, max_new_tokens=number) for number in (1, 5, 3)]
    found = engine.generate(batch)
    assert [len(completion.ids) for completion in found] == [1, 5, 3]
    assert found[0].ids == found[1].ids[:1] and found[2].ids == found[1].ids[:3]


def test_an_answer_ends_where_the_context_ends(engine: Engine) -> None:
    room = 7
    length = len(request(engine, "").prompt.input_ids)
    text = "z" * (engine.processor.context_length - length - room)
    found = engine.generate([request(engine, text, max_new_tokens=100)])[0]
    assert len(found.ids) == room and found.finish_reason == "length"


def test_a_prompt_without_room_for_an_answer_is_refused_with_the_arithmetic(
    engine: Engine,
) -> None:
    length = len(request(engine, "").prompt.input_ids)
    full = engine.processor.context_length
    with pytest.raises(ContextLengthError, match=f"{full} positions.*1 more.*has {full}"):
        engine.generate([request(engine, "z" * (full - length))])


def test_nan_is_an_error_and_no_stream_of_token_zero(engine: Engine) -> None:
    with torch.no_grad():
        engine.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(GenerationError, match="NaN"):
        engine.generate([request(engine)])


def test_the_image_token_is_never_generated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = engine.processor.image_token_id
    force(engine.model, monkeypatch, lambda logits, _: logits[..., token].fill_(1e4))
    assert token not in ids_of(engine, [request(engine)])[0]


# Sampling


def test_a_seeded_answer_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    hot = {"temperature": 1.5, "top_p": 0.9}
    alone = ids_of(engine, [request(engine, seed=5, **hot)])[0]
    assert ids_of(engine, [request(engine, seed=5, **hot)])[0] == alone
    neighbours = [request(engine, "other", (2,), seed=9, **hot), request(engine, "greedy one")]
    assert ids_of(engine, [*neighbours, request(engine, seed=5, **hot)])[2] == alone
    assert ids_of(engine, [request(engine, seed=6, **hot)])[0] != alone


# Stopping


def count_forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    widths: list[int] = []
    force(engine.model, monkeypatch, lambda logits, _: widths.append(len(logits)))
    return widths


def test_a_stop_is_obeyed_before_the_next_decode_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = count_forwards(engine, monkeypatch)
    stop = threading.Event()
    steps = engine.stream(request(engine, stop=stop))
    for _ in range(4):
        row = next(steps)
    stop.set()
    assert [step.finish_reason for step in steps] == ["cancelled"]
    assert len(forwards) == 4 and len(row.ids) == 4


def test_a_stop_set_beforehand_computes_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = count_forwards(engine, monkeypatch)
    encoded = []
    monkeypatch.setattr(engine.model, "encode_images", lambda pixels: encoded.append(pixels))
    stop = threading.Event()
    stop.set()
    found = engine.generate([request(engine, stop=stop)])
    assert found[0].ids == () and found[0].finish_reason == "cancelled"
    assert not forwards and not encoded


def test_a_cancelled_row_leaves_the_others_untouched(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ids_of(engine, [request(engine, "kept", (2,))])[0]
    stop = threading.Event()
    force(engine.model, monkeypatch, lambda _, step: stop.set() if step == 2 else None)
    found = engine.generate([request(engine, stop=stop), request(engine, "kept", (2,))])
    assert found[0].finish_reason == "cancelled" and len(found[0].ids) == 3
    assert found[1].ids == kept


# Threads


def test_parallel_streams_advance_in_turn_and_do_not_mix(engine: Engine) -> None:
    batch = requests(engine)
    alone = [ids_of(engine, [row])[0] for row in batch]
    log: list[int] = []
    found: dict[int, tuple[int, ...]] = {}
    start = threading.Barrier(len(batch))

    def run(number: int) -> None:
        start.wait()
        for row in engine.stream(batch[number]):
            log.append(number)
            last = row
        found[number] = tuple(last.ids)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(len(batch))] == alone
    first_end = min(len(log) - log[::-1].index(number) for number in range(len(batch)))
    assert set(log[:first_end]) == set(range(len(batch)))  # all had begun before one ended


def test_a_stream_that_nobody_reads_on_blocks_nobody(engine: Engine) -> None:
    abandoned = engine.stream(request(engine))
    next(abandoned)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(engine.generate([request(engine)])))
    thread.start()
    thread.join(60)
    assert done


# Features


def encode(engine: Engine, seeds: tuple[int, ...]) -> torch.Tensor:
    images = request(engine, seeds=seeds).prompt.images
    with torch.inference_mode():
        features = engine.encoder.encode(images, [None] * len(images))
    assert features is not None
    return features


def test_cached_features_are_those_computed_bit_for_bit(engine: Engine) -> None:
    computed = encode(engine, (1, 2))
    assert engine.cache.hits == 0
    cached = encode(engine, (1, 2))
    assert engine.cache.hits == 2
    assert torch.equal(computed, cached)
    images = request(engine, seeds=(1, 2)).prompt.images
    fresh = engine.model.encode_images(engine.processor.pixel_values(images))
    assert torch.equal(cached, fresh)


def test_answers_with_a_warm_cache_are_the_same(engine: Engine) -> None:
    cold = ids_of(engine, requests(engine))
    assert engine.cache.misses == 3 and len(engine.cache) == 3
    assert ids_of(engine, requests(engine)) == cold


def spy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    encode_images: Callable[[torch.Tensor], torch.Tensor] = engine.model.encode_images

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return encode_images(pixels)

    monkeypatch.setattr(engine.model, "encode_images", counted)
    return counts


def test_a_picture_that_comes_twice_is_encoded_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = spy(engine, monkeypatch)
    engine.generate([request(engine, "a", (1, 1)), request(engine, "b", (1,))])
    engine.generate([request(engine, "c", (1, 2))])
    assert counts == [1, 1]


def test_the_cache_may_be_too_small_for_the_batch(folders: dict[str, Path]) -> None:
    parts = load_checkpoint(folders["llama"])
    none_kept = Engine(*parts, cache=FeatureCache(max_bytes=0))
    assert ids_of(none_kept, requests(none_kept)) == ids_of(Engine(*parts), requests(none_kept))
    assert none_kept.cache.nbytes == 0


def test_a_shared_cache_keeps_models_and_preprocessing_apart(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    cache = FeatureCache()
    other_folder = testing.tiny_llava_folder(tmp_path / "other", seed=2)
    grey = shutil.copytree(folders["llama"], tmp_path / "grey")
    settings = grey / "processor_config.json"
    raw = json.loads(settings.read_text())
    raw["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    settings.write_text(json.dumps(raw))
    one = Engine(*load_checkpoint(folders["llama"]), identity="one", cache=cache)
    two = Engine(*load_checkpoint(other_folder), identity="two", cache=cache)
    three = Engine(*load_checkpoint(grey), identity="one", cache=cache)
    features = [encode(engine, (1,)) for engine in (one, two, three)]
    assert len(cache) == 3
    assert not torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])


def test_pixels_made_by_the_caller_are_used(engine: Engine) -> None:
    plain = request(engine, "a", (4, 5))
    made = engine.processor.pixel_values(plain.prompt.images)
    ready = Request(plain.prompt, plain.sampling, None, made)
    alone = ids_of(engine, [plain])
    engine.cache.clear()
    engine.processor.pixel_values = None  # type: ignore[assignment,method-assign]
    assert ids_of(engine, [ready]) == alone
