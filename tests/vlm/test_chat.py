"""A kept conversation: the same answers as from scratch, and only what is new is computed."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.engine.prefixes import PrefixStore
from vlm.errors import ContextLengthError, ImageError, MessageError
from vlm.messages import Message, assistant, user

PICTURE, OTHER = (testing.draw_image(seed=seed) for seed in (1, 2))
LONG = {"max_new_tokens": 12, "stop_loops": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("chat"), "qwen2", 3)


@pytest.fixture
def model(folder: Path) -> Assistant:
    return load(folder)


def computed(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that each prefill runs through the decoder."""
    runs: list[int] = []
    embed = model.engine.model.embed

    def counted(ids: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        if ids.numel() > 1:
            runs.append(ids.numel())
        return embed(ids, features)

    monkeypatch.setattr(model.engine.model, "embed", counted)
    return runs


def scratch(folder: Path, messages: list[Message], **options: object) -> str:
    """The answer of a model that has never seen anything."""
    return load(folder).generate([messages], **{**LONG, **options})[0].text


def test_every_turn_is_what_scratch_would_answer(
    folder: Path, model: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = computed(model, monkeypatch)
    chat = model.chat(system="be brief")
    said: list[Message] = []
    turns = [("what is it?", [PICTURE]), ("sure?", []), ("and this?", [OTHER]), ("which?", [])]
    for text, images in turns:
        answer = "".join(chat.send(text, images, **LONG))
        asked = [*said, user(text, *images)]
        system = Message("system", user("be brief").content)
        assert answer == scratch(folder, [system, *asked])
        said = [*asked, assistant(answer)]
    assert [m.text for m in chat.messages] == [m.text for m in said]
    whole = len(
        model.prepare([Message("system", user("be brief").content), *said[:-1]]).prompt.input_ids
    )
    assert len(runs) == 4 and sum(runs) < 1.4 * whole  # from scratch it would be 2.5 times


def test_again_and_edit_start_from_what_is_shared(
    folder: Path, model: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = model.chat()
    first = "".join(chat.send("what is in this picture?", [PICTURE], **LONG))
    second = "".join(chat.send("and what else is there?", **LONG))
    runs = computed(model, monkeypatch)
    assert "".join(chat.again(**LONG)) == second
    assert runs == []  # nothing but the last position, as in any decode step
    changed = "".join(chat.edit(1, "and what more is there?", **LONG))
    told = [user("what is in this picture?", PICTURE), assistant(first)]
    assert changed == scratch(folder, [*told, user("and what more is there?")])
    assert runs[-1] < 30
    again = "".join(chat.edit(0, "what colour is it?", **LONG))
    assert again == scratch(folder, [user("what colour is it?", PICTURE)])
    assert [m.text for m in chat.messages] == ["what colour is it?", again]


def test_two_chats_do_not_mix(folder: Path, model: Assistant) -> None:
    chats = [model.chat(), model.chat()]
    pictures = [PICTURE, OTHER]
    answers = ["".join(c.send("what?", [p], **LONG)) for c, p in zip(chats, pictures, strict=True)]
    for chat, picture, answer in zip(chats, pictures, answers, strict=True):
        told = [user("what?", picture), assistant(answer), user("why?")]
        assert "".join(chat.send("why?", **LONG)) == scratch(folder, told)


def test_a_chat_that_had_to_make_room_is_computed_anew(folder: Path, model: Assistant) -> None:
    model.engine.prefixes = PrefixStore(max_bytes=100_000)
    chats = [model.chat() for _ in range(3)]
    answers = ["".join(chat.send(f"number {i}", [PICTURE], **LONG)) for i, chat in enumerate(chats)]
    assert 0 < len(model.engine.prefixes) < 3
    assert model.engine.prefixes.nbytes <= 100_000
    told = [user("number 0", PICTURE), assistant(answers[0]), user("why?")]
    assert "".join(chats[0].send("why?", **LONG)) == scratch(folder, told)


def test_errors_leave_the_conversation_as_it_was(model: Assistant, tmp_path: Path) -> None:
    chat = model.chat()
    with pytest.raises(MessageError, match="nothing was asked yet"):
        chat.again()
    "".join(chat.send("one", **LONG))
    before = list(chat.messages)
    with pytest.raises(ImageError):
        chat.send("two", [tmp_path / "none.png"])
    with pytest.raises(MessageError):
        chat.send("  ")
    with pytest.raises(MessageError, match="no question 1; the chat has 1"):
        chat.edit(1, "x")
    with pytest.raises(ContextLengthError):
        chat.send("x" * 600)
    assert chat.messages == before


def test_whole_turns_fall_out_only_if_asked_to(folder: Path, model: Assistant) -> None:
    chat, short = model.chat(trim=True), model.chat()
    for number in range(3):
        for each in (chat, short):
            "".join(each.send(f"{number} " + "x" * 40, [PICTURE], **LONG))
    long = "y" * 130
    with pytest.raises(ContextLengthError):
        short.send(long)
    answer = "".join(chat.send(long, **LONG))
    assert answer == scratch(folder, [*chat.messages[4:-2], user(long)])
    assert len(chat.messages) == 8  # nothing is forgotten by the chat itself
    with pytest.raises(ContextLengthError):
        chat.send("z" * 600)


def some(pieces: Iterator[str]) -> list[str]:
    """The first pieces, until there is something to be seen."""
    said = [next(pieces)]
    while not "".join(said).strip():
        said.append(next(pieces))
    return said


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(model: Assistant) -> None:
    chat, stop = model.chat(), threading.Event()
    pieces = chat.send("what is it?", [PICTURE], stop=stop, **LONG)
    said = some(pieces)
    stop.set()
    said += pieces
    assert chat.messages[-1].text == "".join(said)
    closed = chat.send("and?", **LONG)
    said = some(closed)
    closed.close()
    assert chat.messages[-1].text == "".join(said) and len(chat.messages) == 4
