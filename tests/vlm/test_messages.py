"""Conversations and records: what is accepted, and what each refusal says."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import MessageError, RecordError
from vlm.messages import ImagePart, Message, TextPart, assistant, parse_messages, read_records, user


def test_user_puts_the_pictures_before_the_text() -> None:
    message = user("what?", "a.png", "b.png")
    assert message.content == (ImagePart("a.png"), ImagePart("b.png"), TextPart("what?"))
    assert message.text == "what?"
    assert message.images == ("a.png", "b.png")


def test_mappings_and_messages_mean_the_same() -> None:
    raw = [
        {"role": "system", "content": "be kind"},
        {
            "role": "user",
            "content": [{"type": "image", "image": b"x"}, {"type": "text", "text": "q"}],
        },
        assistant("a"),
    ]
    system = Message("system", (TextPart("be kind"),))
    assert parse_messages(raw) == [system, user("q", b"x"), assistant("a")]


SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
IMAGE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "empty"),
        ([SYSTEM], "no user message"),
        ([SYSTEM, SYSTEM, USER], "at most one"),
        ([USER, SYSTEM], "must be the first"),
        ([ANSWER, USER], "user first"),
        ([USER, USER], "alternate"),
        ([USER, ANSWER, ANSWER], "alternate"),
        ([{"role": "tool", "content": "q"}], "unknown role 'tool'"),
        ([{"role": "user", "contents": "q"}], "did you mean 'content'"),
        ([{"role": "user", "content": 3}], "string or a list"),
        ([{"role": "user", "content": [{"type": "video"}]}], "unknown type 'video'"),
        ([{"role": "user", "content": [{"type": "text", "txt": "q"}]}], "did you mean 'text'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "needs 'image'"),
        ([USER, {"role": "assistant", "content": [IMAGE]}], "picture in a assistant message"),
        ([{"role": "user", "content": " \n"}], "the question of the user is empty"),
        ([{"role": "user", "content": [IMAGE]}], "the question of the user is empty"),
        ([USER, {"role": "assistant", "content": ""}], "message 2"),
        ([{"role": "user", "content": "a\0b"}], "NUL"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        (["hello"], "message 1 is a str"),
    ],
)
def test_broken_conversations_are_refused(raw: list[Any], reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        parse_messages(raw)


def _write(folder: Path, *rows: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


PICTURE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}


def test_records_bind_pictures_to_their_places(tmp_path: Path) -> None:
    row = {"id": "1", "images": ["p/a.png"], "messages": [PICTURE, ANSWER], "meta": {"k": 1}}
    [record] = read_records(_write(tmp_path, row))
    expected = str(tmp_path.resolve() / "p/a.png")
    assert record.images == (expected,)
    assert record.messages[0].images == (expected,)
    assert record.messages[1].text == "a"
    assert (record.id, dict(record.meta), record.source) == ("1", {"k": 1}, None)


def test_records_without_answer_or_picture_are_allowed(tmp_path: Path) -> None:
    rows = [{"id": "1", "images": ["a.png"]}, {"id": "2", "messages": [USER]}]
    first, second = read_records(_write(tmp_path, *rows))
    assert first.messages == () and len(first.images) == 1
    assert second.images == () and second.messages[0].text == "q"


@pytest.mark.parametrize("image", ["loop.png", "a\0.png"])
def test_names_that_lead_nowhere(tmp_path: Path, image: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(RecordError, match=r"line 1: .*leads nowhere"):
        list(read_records(_write(tmp_path, {"id": "1", "images": [image]})))


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"line 1: not JSON .*recursion"):
        list(read_records(_write(tmp_path, "[" * 100_000)))


def test_reading_is_lazy(tmp_path: Path) -> None:
    records = read_records(_write(tmp_path, {"id": "1"}, "{broken"))
    assert next(records).id == "1"
    with pytest.raises(RecordError, match="line 2"):
        next(records)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "line 1: not JSON"),
        ([1], "must be a JSON object"),
        ({"images": []}, "'id' must be"),
        ({"id": "1", "image": "a.png"}, "unknown key 'image'; did you mean 'images'"),
        ({"id": "1", "images": "a.png"}, "'images' must be a list"),
        ({"id": "1", "license": 3}, "'license' must be a string"),
        ({"id": "1", "meta": []}, "'meta' must be an object"),
        ({"id": "1", "images": ["a.png"], "messages": [USER]}, "1 images but 0 image parts"),
        ({"id": "1", "images": [], "messages": [PICTURE]}, "0 images but 1 image parts"),
        ({"id": "1", "messages": [ANSWER]}, "no user message"),
    ],
)
def test_broken_records_name_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    path = _write(tmp_path, row)
    with pytest.raises(RecordError, match=reason) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_wrong_encoding_are_record_errors(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        list(read_records(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(RecordError, match="not UTF-8"):
        list(read_records(tmp_path / "latin.jsonl"))
