import copy
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from serve.session import INTERNAL_ERROR, ChatSession, Sampling, State
from serve.view import chatbot_messages
from vlm.errors import ContextLengthError, ImageError, MessageError, VlmError
from vlm.messages import Message

GREEDY = Sampling()


class Script:
    """Says the given pieces in turn; an exception in the list is raised."""

    def __init__(self, *answers: Sequence[str | BaseException]) -> None:
        self.answers = list(answers)
        self.seen: list[list[Message]] = []
        self.stops: list[threading.Event] = []

    def stream(
        self, messages: Sequence[Message], *, stop: threading.Event | None = None, **_: Any
    ) -> Iterator[str]:
        assert stop is not None
        self.seen.append(list(messages))
        self.stops.append(stop)
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def say(session: ChatSession, model: Script, question: str, *pictures: str) -> None:
    session.begin(question, pictures)
    for _ in session.answer(model, GREEDY):
        pass


def told(messages: Sequence[Message]) -> list[tuple[str, str, tuple[Any, ...]]]:
    return [(m.role, m.text, m.images) for m in messages]


def replies(session: ChatSession) -> list[str]:
    return [
        m["content"][-1]["text"]
        for m in chatbot_messages(session.turns)
        if m["role"] == "assistant"
    ]


def test_pictures_and_answers_stay_for_later_questions() -> None:
    session, model = ChatSession(), Script(["a ", "dog"], ["brown"])
    say(session, model, "what is it?", "/a.png", "/b.png")
    say(session, model, "which colour?")
    assert told(model.seen[1]) == [
        ("user", "what is it?", ("/a.png", "/b.png")),
        ("assistant", "a dog", ()),
        ("user", "which colour?", ()),
    ]
    assert replies(session) == ["a dog", "brown"]
    assert not session.busy


def test_every_piece_is_news() -> None:
    session, model = ChatSession(), Script(["one ", "two ", "three"])
    session.begin("count")
    grown = [session.turns[-1].answer for _ in session.answer(model, GREEDY)]
    assert grown == ["one ", "one two ", "one two three"]


def test_stop_reaches_the_model_and_keeps_what_was_said() -> None:
    session, model = ChatSession(), Script(["so ", "far ", "LATE"], ["next"])
    session.begin("talk")
    answer = session.answer(model, GREEDY)
    next(answer)
    next(answer)
    assert not model.stops[0].is_set()
    session.stop()
    assert model.stops[0].is_set()
    assert list(answer) == []
    assert session.turns[0].answer == "so far "
    assert replies(session) == ["so far (stopped)"]
    say(session, model, "go on")
    assert told(model.seen[1])[1] == ("assistant", "so far ", ())


def test_a_model_slow_to_stop_cannot_write_into_the_next_answer() -> None:
    session, model = ChatSession(), Script(["old ", "OLD"], ["new ", "NEW"])
    session.begin("first")
    old = session.answer(model, GREEDY)
    next(old)
    session.begin("second")  # stops the first; its thread has not noticed yet
    new = session.answer(model, GREEDY)
    next(new)
    assert list(old) == []
    assert [t.answer for t in session.turns] == ["old ", "new "]
    assert session.turns[1].state is State.RUNNING
    list(new)
    assert [t.answer for t in session.turns] == ["old ", "new NEW"]


def test_stop_before_the_model_starts_asks_it_nothing() -> None:
    session, model = ChatSession(), Script()
    session.begin("never mind")
    session.stop()
    assert list(session.answer(model, GREEDY)) == []
    assert model.seen == []
    assert replies(session) == ["(stopped)"]


def test_closing_the_answer_stops_the_model() -> None:
    session, model = ChatSession(), Script(["a", "b"])
    session.begin("q")
    answer = session.answer(model, GREEDY)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert model.stops[0].is_set()
    assert session.turns[0].state is State.STOPPED


@pytest.mark.parametrize("error", [ImageError("x.png is empty", "empty_image"), VlmError("no")])
def test_an_error_is_shown_with_its_text_and_the_chat_goes_on(error: VlmError) -> None:
    session, model = ChatSession(), Script(["half ", error], ["fine"])
    say(session, model, "first")
    assert replies(session) == [f"half \n\u26a0 {error}"]
    say(session, model, "second")
    assert told(model.seen[1]) == [("user", "second", ())]
    assert replies(session)[1] == "fine"


def test_an_unexpected_error_is_logged_and_its_text_kept_from_the_page(
    caplog: pytest.LogCaptureFixture,
) -> None:
    session, model = ChatSession(), Script([RuntimeError("secret")], ["fine"])
    say(session, model, "first")
    assert replies(session) == [f"\u26a0 {INTERNAL_ERROR}"]
    assert "secret" in caplog.text
    say(session, model, "second")
    assert replies(session)[1] == "fine"


def test_a_picture_without_a_question_is_told_so_and_waits_for_one() -> None:
    session, model = ChatSession(), Script(["a dog"])
    say(session, model, "  ", "/a.png")
    assert isinstance(session.turns[0].error, str) and "empty" in session.turns[0].error
    assert model.seen == []
    say(session, model, "what is it?")
    assert told(model.seen[0]) == [("user", "what is it?", ("/a.png",))]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ImageError("bad", "undecodable"), ()),
        (ContextLengthError("too long"), ()),
        (MessageError("odd"), ("/a.png",)),
    ],
)
def test_pictures_of_a_failed_question_are_kept_unless_they_were_the_trouble(
    error: VlmError, kept: tuple[str, ...]
) -> None:
    session, model = ChatSession(), Script([error], ["fine"], ["again"])
    say(session, model, "first", "/a.png")
    say(session, model, "second", "/b.png")
    assert told(model.seen[1]) == [("user", "second", (*kept, "/b.png"))]
    say(session, model, "third")
    assert told(model.seen[2])[0] == ("user", "second", (*kept, "/b.png"))


def test_an_empty_answer_is_said_to_be_one_and_not_remembered() -> None:
    session, model = ChatSession(), Script([" "], ["fine"])
    say(session, model, "first", "/a.png")
    assert replies(session) == ["(the model gave no answer)"]
    say(session, model, "second")
    assert told(model.seen[1]) == [("user", "second", ("/a.png",))]


def test_retry_replaces_the_last_answer() -> None:
    session, model = ChatSession(), Script(["one"], ["two"], ["three"])
    say(session, model, "a", "/a.png")
    say(session, model, "b", "/b.png")
    session.retry()
    list(session.answer(model, GREEDY))
    assert replies(session) == ["one", "three"]
    assert model.seen[2] == model.seen[1]


def test_undo_takes_the_last_question_back() -> None:
    session, model = ChatSession(), Script(["one"], ["two"])
    say(session, model, "a")
    say(session, model, "b", "/b.png")
    turn = session.undo()
    assert turn is not None and (turn.question, turn.pictures) == ("b", ("/b.png",))
    assert [t.question for t in session.turns] == ["a"]
    session.undo()
    assert session.undo() is None


def test_clear_forgets_and_stops() -> None:
    session, model = ChatSession(), Script(["x", "y"], ["z"])
    session.begin("q", ["/a.png"])
    answer = session.answer(model, GREEDY)
    next(answer)
    session.clear()
    assert model.stops[0].is_set()
    assert list(answer) == [] and session.turns == ()
    say(session, model, "new")
    assert told(model.seen[1]) == [("user", "new", ())]


def test_sampling_reaches_the_model() -> None:
    seen: dict[str, object] = {}

    class Recorder:
        def stream(self, messages: Sequence[Message], **options: Any) -> Iterator[str]:
            seen.update(options)
            yield "x"

    session = ChatSession()
    session.begin("q")
    list(session.answer(Recorder(), Sampling(7, 0.5, 0.9, 3)))
    assert seen.pop("stop") is not None and seen.pop("keep") is True
    assert seen == {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}


def test_a_copy_shares_nothing() -> None:
    session = ChatSession()
    session.begin("mine")
    other = copy.deepcopy(session)
    assert other.turns == ()
    other.begin("yours")
    assert [t.question for t in session.turns] == ["mine"]


def test_texts_are_shown_literally_and_survive_json() -> None:
    session, model = ChatSession(), Script(["  <script>alert(1)</script> & ![x](http://e/)"])
    say(session, model, "<image> </s>", "/a.png")
    user, reply = chatbot_messages(session.turns)
    assert user["content"][0] == {"path": "/a.png"}
    assert user["content"][1]["text"] == "&lt;image&gt; &lt;/s&gt;"
    assert reply["content"][0]["text"] == (
        "  &lt;script&gt;alert(1)&lt;/script&gt; &amp; ![x](http://e/)"
    )
    say(session, Script(), "half a character: \ud800")
    shown = chatbot_messages(session.turns)
    assert json.dumps(shown, ensure_ascii=False).encode("utf-8")
    assert "lone surrogate" in shown[-1]["content"][0]["text"]
