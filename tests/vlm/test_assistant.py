"""The Python face: every way to ask gives the same answer, and wrong input is told."""

import json
import shutil
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm import builtin, testing
from vlm.assistant import Assistant, load
from vlm.errors import CheckpointError, ConfigError, ContextLengthError, ImageError, MessageError
from vlm.messages import assistant as answered
from vlm.messages import user

PICTURE = testing.draw_image(seed=1)
OTHER = testing.draw_image(seed=2)


def test_every_way_to_ask_gives_the_same_answer(model: Assistant) -> None:
    text = model.ask(PICTURE, "what is it?", max_new_tokens=30)
    assert len(text) > 5
    message = user("what is it?", PICTURE)
    as_mapping = {
        "role": "user",
        "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is it?"}],
    }
    assert "".join(model.stream([message], max_new_tokens=30)) == text
    assert "".join(model.stream([as_mapping], max_new_tokens=30)) == text
    assert model.generate([[message]], max_new_tokens=30)[0].text == text
    assert model.caption(PICTURE, prompt="what is it?", max_new_tokens=30) == text
    pairs = [(PICTURE, "what is it?"), (None, "and without?"), ([PICTURE, OTHER], "both?")]
    assert next(iter(model.ask_many(pairs, max_new_tokens=30))) == text


def test_the_answer_depends_on_picture_question_and_history(model: Assistant) -> None:
    chats = [
        [user("a?", PICTURE)],
        [user("a?", OTHER)],
        [user("a?")],
        [user("b?", PICTURE)],
        [user("a?", PICTURE), answered("yes"), user("a?")],
    ]
    found = [answer.text for answer in model.generate(chats, max_new_tokens=12)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_ask_many_keeps_the_order_at_any_batch_size(model: Assistant, batch_size: int) -> None:
    pairs = [(testing.draw_image(seed=seed), f"question {seed}?") for seed in range(5)]
    expected = [model.ask(image, text, max_new_tokens=6) for image, text in pairs]
    assert list(model.ask_many(pairs, batch_size, max_new_tokens=6)) == expected


def test_ask_many_reads_no_further_than_needed(model: Assistant) -> None:
    taken = 0

    def pairs() -> Iterator[tuple[Any, str]]:
        nonlocal taken
        while True:
            taken += 1
            yield None, "again?"

    assert len(list(islice(model.ask_many(pairs(), 3, max_new_tokens=2), 2))) == 2
    assert taken <= 3 * 3  # those at the model, the next ones, and a batch ahead


def test_ask_many_answers_what_comes_before_a_bad_picture(model: Assistant) -> None:
    found: list[str] = []
    with pytest.raises(ImageError, match="empty"):
        found.extend(model.ask_many([(PICTURE, "a?"), (OTHER, "a?"), (b"", "a?")], 8))
    assert found == [model.ask(PICTURE, "a?"), model.ask(OTHER, "a?")]


def test_sampling_is_repeatable_through_every_door(model: Assistant) -> None:
    hot: Any = {"temperature": 1.2, "top_p": 0.95, "seed": 3, "max_new_tokens": 20}
    text = model.ask(PICTURE, "what?", **hot)
    assert "".join(model.stream([user("what?", PICTURE)], **hot)) == text
    assert model.ask(PICTURE, "what?", **{**hot, "seed": 4}) != text


def test_generate_tells_why_an_answer_ended_and_counts(model: Assistant) -> None:
    stop = threading.Event()
    stop.set()
    short, long = model.generate([[user("b?", PICTURE)], [user("bb?")]], max_new_tokens=3)
    assert (short.finish_reason, short.num_new_tokens) == ("length", 3)
    line_break, letter = 1, 1  # after the picture; the second b
    difference = short.num_prompt_tokens - long.num_prompt_tokens
    assert difference == testing.NUM_VISUAL_TOKENS + line_break - letter
    cancelled = model.generate([[user("a?")]], stop=stop)[0]
    assert (cancelled.finish_reason, cancelled.text) == ("cancelled", "")


def test_stopping_a_stream_frees_the_model_at_once(model: Assistant) -> None:
    stop = threading.Event()
    pieces = model.stream([user("a?", PICTURE)], stop=stop, max_new_tokens=400)
    first = next(pieces)
    stop.set()
    rest = "".join(pieces)
    assert len((first + rest).encode()) < 20
    expected = model.ask(OTHER, "b?", max_new_tokens=8)
    assert "".join(model.stream([user("b?", OTHER)], max_new_tokens=8)) == expected


def test_two_threads_streaming_at_once_do_not_mix(model: Assistant) -> None:
    chats = {name: [user(f"{name}?", testing.draw_image(seed=ord(name)))] for name in "pqrs"}
    expected = {
        name: model.generate([chat], max_new_tokens=40)[0].text for name, chat in chats.items()
    }
    found: dict[str, str] = {}
    start = threading.Barrier(len(chats))

    def run(name: str) -> None:
        start.wait()
        found[name] = "".join(model.stream(chats[name], max_new_tokens=40))

    threads = [threading.Thread(target=run, args=(name,)) for name in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected
    assert len(set(found.values())) == len(found)


# Wrong input


def test_stream_refuses_wrong_arguments_before_the_first_piece(model: Assistant) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        model.stream([user("a?")], temperature=-1)
    with pytest.raises(MessageError, match="empty"):
        model.stream([user("   ", PICTURE)])
    with pytest.raises(MessageError, match="end with the user"):
        model.stream([user("a?"), answered("b")])
    with pytest.raises(ImageError, match="empty"):
        model.stream([user("a?", b"")])
    with pytest.raises(ContextLengthError, match="positions"):
        model.stream([user("a" * 600)])


def test_a_wrong_batch_size_or_option_is_told(model: Assistant) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        next(iter(model.ask_many([(None, "a?")], batch_size=0)))
    with pytest.raises(TypeError, match="max_tokens"):
        model.ask(None, "a?", max_tokens=3)  # type: ignore[call-arg]


# Opening


def test_what_is_known_of_a_model(model: Assistant, folder: Path) -> None:
    assert model.name == "tiny"
    assert "trained on" in model.about
    assert model.caption_prompt == "describe the picture."
    assert model.examples == () and not model.built_in
    assert str(model.device) == "cpu"
    parts = model.engine.model
    assert model.num_parameters == sum(
        p.numel()
        for part in (parts.vision_tower, parts.multi_modal_projector, parts.language_model)
        for p in part.parameters()
    )
    assert vlm.load is load and vlm.Assistant is Assistant


def test_about_json_speaks_for_the_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = {
        "name": "Scenes",
        "knows": "drawn scenes",
        "caption_prompt": "what is it?",
        "examples": [{"image": "examples/one.png", "question": "how many?"}],
    }
    (copy / "about.json").write_text(json.dumps(about))
    model = load(copy)
    assert (model.name, model.about) == ("Scenes", "drawn scenes")
    assert model.examples == ((copy / "examples/one.png", "how many?"),)
    text = model.ask(PICTURE, "what is it?", max_new_tokens=5)
    assert model.caption(PICTURE, max_new_tokens=5) == text
    assert model.caption(PICTURE, prompt="other?", max_new_tokens=5) != text


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": 3}', '{"examples": ["x"]}', '{"examples": {}}', '{"knows": " "}']
)
def test_a_malformed_about_json_is_told(folder: Path, tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "about.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"about\.json"):
        load(copy)


def test_identity_is_of_the_contents(folder: Path, tmp_path: Path, model: Assistant) -> None:
    copy = shutil.copytree(folder, tmp_path / "renamed")
    assert load(copy).identity == model.identity
    other = testing.tiny_llava_folder(tmp_path / "other", "qwen2", seed=5)
    assert load(other).identity != model.identity


def test_precision_is_float32_on_the_cpu_unless_asked(folder: Path) -> None:
    assert load(folder, device="cpu").engine.model.dtype == torch.float32
    assert load(folder, dtype="bfloat16").engine.model.dtype == torch.bfloat16
    assert load(folder, dtype=torch.bfloat16).engine.model.dtype == torch.bfloat16


def test_unknown_devices_and_types_are_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'gpu'"):
        load(folder, device="gpu")
    with pytest.raises(ConfigError, match=r"'int4'.*bfloat16"):
        load(folder, dtype="int4")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not available"):
            load(folder, device="cuda")


def test_loading_leaves_global_state_alone(folder: Path) -> None:
    import gc

    torch.manual_seed(0)
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state())
    load(folder).ask(PICTURE, "a?", max_new_tokens=2)
    assert gc.isenabled()
    assert torch.get_num_threads() == before[0]
    assert torch.get_default_dtype() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_absent_built_in_model_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(builtin, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="make built-in"):
        load()


def test_the_built_in_model_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    monkeypatch.setattr(builtin, "__file__", str(tmp_path / "__init__.py"))
    model = load()
    assert model.built_in and model.ask(PICTURE, "a?", max_new_tokens=2)


def test_a_saved_model_answers_as_before(tmp_path: Path) -> None:
    model = load(testing.tiny_llava_folder(tmp_path / "a"))
    model.save(tmp_path / "b")
    picture = testing.draw_image()
    again = load(tmp_path / "b")
    assert again.ask(picture, "what?", max_new_tokens=6) == model.ask(
        picture, "what?", max_new_tokens=6
    )
