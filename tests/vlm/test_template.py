"""Skeletons of chat templates: texts stay texts, and a template can do no harm."""

from typing import Any

import pytest

from vlm import template, testing
from vlm.errors import CheckpointError, MessageError
from vlm.messages import Message, TextPart, assistant, user
from vlm.template import ChatTemplate, Literal, Skeleton, Slot, slot_texts

PICTURE = testing.draw_image()
CHAT = [user(" what? ", PICTURE), assistant("red"), user("sure?")]

PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def opened(source: str = testing.ROLE_TOKENS) -> ChatTemplate:
    return ChatTemplate(source, testing.byte_tokenizer(), "<image>")


def test_a_skeleton_holds_slots_between_what_the_template_wrote() -> None:
    expected = Skeleton(
        (
            Literal("<|user|><image> "),
            Slot(0, False),
            Literal(" <|end|><|assistant|>"),
            Slot(1, True),
            Literal("<|end|><|user|>", num_learnt=len("<|end|>")),
            Slot(2, False),
            Literal("<|end|><|assistant|>"),
        ),
        num_images=1,
    )
    assert opened().skeleton(CHAT, True) == expected
    assert slot_texts(CHAT) == ["what?", "red", "sure?"]


@pytest.mark.parametrize(("name", "parts"), [("vicuna", True), ("chatml", True), ("llama2", False)])
def test_parts_or_plain_strings_is_found_out(name: str, parts: bool) -> None:
    assert opened(testing.TEMPLATES[name]).takes_parts is parts


def test_one_skeleton_serves_all_texts_of_one_shape() -> None:
    chat = opened()
    first = chat.skeleton([user("a", PICTURE)], True)
    assert chat.skeleton([user("quite another", testing.draw_image(seed=1))], True) is first
    others = [
        chat.skeleton([user("a", PICTURE)], False),
        chat.skeleton([user("a")], True),
        chat.skeleton([user(" a", PICTURE)], True),
        chat.skeleton([user("a", PICTURE, PICTURE)], True),
        chat.skeleton([user("a", PICTURE), assistant("b")], True),
    ]
    assert len({skeleton.pieces for skeleton in (first, *others)}) == 6


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_MAX_SKELETONS", 8)
    chat = opened()
    for spaces in range(40):
        chat.skeleton([user(" " * spaces + "a")], True)
    assert len(chat._cache) <= 8


@pytest.mark.parametrize(
    "typed", ["\ue0000\ue001", "\ue0001\ue001", "\ue000", "{{ 7 * 7 }}", "{% raw %}", "<image>"]
)
def test_nothing_typed_is_seen_by_the_template(typed: str) -> None:
    chat = opened()
    assert chat.skeleton([user(f"x{typed}y", PICTURE)], True) == chat.skeleton(
        [user("x", PICTURE)], True
    )
    assert slot_texts([user(f"x{typed}y")]) == [f"x{typed}y"]


def test_empty_texts_have_no_slot_and_spaces_have_one() -> None:
    message = Message("user", (TextPart(""), TextPart("a"), TextPart("  "), TextPart("b")))
    pieces = opened().skeleton([message], False).pieces
    assert [p.index for p in pieces if isinstance(p, Slot)] == [0, 1, 2]
    assert slot_texts([message]) == ["a", "  ", "b"]


def test_the_end_of_a_turn_is_a_token_and_nothing_else() -> None:
    assert opened().turn_end() == "<|end|>"
    assert opened(PARTS).turn_end() is None
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} END\n{% endfor %}"
    assert opened(plain).turn_end() is None


BROKEN = {
    "syntax": "{% if %}",
    "empty": "",
    "undefined": "{{ messages[7]['role'].lower() }}" + testing.ROLE_TOKENS,
    "arithmetic": "{{ 1 // 0 }}" + testing.ROLE_TOKENS,
    "endless": "{% for i in range(10**9) %}x{% endfor %}" + testing.ROLE_TOKENS,
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + testing.ROLE_TOKENS,
    "two pictures": PARTS.replace("<image>", "<image><image>"),
    "doubled text": PARTS.replace("p['text']", "p['text'] * 2"),
    "changes messages": "{{ messages.clear() }}" + testing.ROLE_TOKENS,
}


@pytest.mark.parametrize("name", BROKEN)
def test_templates_that_cannot_be_used_are_refused_when_opened(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"correct chat_template\.jinja"):
        opened(BROKEN[name])


@pytest.mark.parametrize(
    "expression",
    [
        "cycler.__init__.__globals__.os.system('touch {path}')",
        "''.__class__.__mro__[1].__subclasses__()",
        "raise_exception.__globals__['os']",
        "self.__init__.__globals__",
    ],
)
def test_a_template_runs_no_code_of_its_own(expression: str, tmp_path: Any) -> None:
    mark = tmp_path / "mark"
    attack = "{{ (" + expression.format(path=mark) + ") ~ '' }}"
    with pytest.raises(CheckpointError):
        opened(attack + testing.ROLE_TOKENS)
    assert not mark.exists()


def test_errors_on_some_conversations_are_told_for_these_alone() -> None:
    guard = "{% if messages | length > 2 %}{{ 1 // 0 }}{% endif %}"
    chat = opened(guard + testing.ROLE_TOKENS)
    assert chat.skeleton(CHAT[:1], True).num_images == 1
    with pytest.raises(MessageError, match=r"chat template refuses.*zero"):
        chat.skeleton(CHAT, True)
