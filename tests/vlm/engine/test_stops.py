"""Stop strings: against a search by brute force, whatever the tokens and the pieces."""

from collections.abc import Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.request import Request, Row
from vlm.engine.runner import Engine
from vlm.engine.sampling import Draw, Sampling
from vlm.engine.stops import StopScanner, StopText
from vlm.engine.stream import pieces
from vlm.messages import user
from vlm.processor import Encoded

EOS = testing.SPECIAL_TOKENS.index("</s>")
often = settings(derandomize=True, deadline=None, max_examples=400)
# Few characters, so that strings overlap; the last two are several tokens each.
texts = st.text("ab€👩", max_size=25)
stops = st.lists(st.text("ab€👩", min_size=1, max_size=4), min_size=1, max_size=8)


def cut(text: str, strings: Sequence[str]) -> str:
    """The text before the stop string that is complete first; the longest, if several are."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)]
    return text


def certain(text: str, strings: Sequence[str]) -> str:
    """What of a text without a stop string precedes every stop string that may yet come."""
    begun = [
        size
        for string in strings
        for size in range(min(len(string), len(text) + 1))
        if text.endswith(string[:size])
    ]
    return text[: len(text) - max(begun)]


@cache
def tokenizer() -> Any:
    return testing.byte_tokenizer()


def encode(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def decode(ids: Sequence[int]) -> str:
    return str(tokenizer().decode(list(ids), skip_special_tokens=True))


# The scanner


@often
@given(texts, stops, st.data())
def test_pieces_of_any_size_join_to_the_text_before_the_first_stop_string(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    scanner = StopScanner(strings)
    given_text = told = ""
    while len(given_text) < len(text):
        size = data.draw(st.integers(1, 6))
        piece = text[len(given_text) : len(given_text) + size]
        given_text += piece
        told += scanner.add(piece)
        expected = cut(given_text, strings)
        assert scanner.found == (expected != given_text)
        assert told == (expected if scanner.found else certain(given_text, strings))
        assert scanner.held == ("" if scanner.found else given_text[len(told) :])
    assert told + scanner.held == cut(text, strings)


@pytest.mark.parametrize(
    ("text", "strings", "expected"),
    [
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),  # a false start overlaps the real one
        ("ababac", ["abac"], "ab"),
        ("abcd", ["bc", "abcd"], "a"),  # complete first
        ("xabc", ["c", "bc", "abc"], "x"),  # complete at once: the longest
        ("abx", ["abc"], "abx"),
        ("ab", ["abc"], "ab"),
        ("stop", ["stop"], ""),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_examples(text: str, strings: list[str], expected: str) -> None:
    for size in range(1, len(text) + 1):
        scanner = StopScanner(strings)
        told = [scanner.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(told) + scanner.held == expected == cut(text, strings)


def test_nothing_comes_after_a_stop_string() -> None:
    scanner = StopScanner(["."])
    assert [scanner.add(piece) for piece in ("a", "b.c", "d")] == ["a", "b", ""]


def test_a_long_stop_string_costs_no_more_a_character() -> None:
    scanner = StopScanner(["a" * 999 + "b"])
    told = "".join(scanner.add("a") for _ in range(3000))
    assert told == "a" * 2001 and scanner.add("b") == "" and scanner.found


# Tokens


@often
@given(texts, stops)
def test_tokens_give_the_text_before_the_first_stop_string(text: str, strings: list[str]) -> None:
    ids = encode(text)
    stop_text = StopText(strings, decode)
    expected = cut(text, strings)
    grown = ""
    for number, token in enumerate(ids, 1):
        found = stop_text.add(token)
        assert stop_text.text.startswith(grown) and expected.startswith(stop_text.text)
        grown = stop_text.text
        whole = decode(ids[:number]).rstrip("\ufffd")
        assert found == (cut(whole, strings) != whole)
        if found:
            break
    assert stop_text.final() == (expected, expected != text)
    assert stop_text.final() == (expected, expected != text)  # asking changes nothing


def test_a_stop_string_in_what_the_last_token_leaves_behind() -> None:
    stop_text = StopText(["\ufffd"], decode)
    for token in encode("a€")[:-1]:
        assert not stop_text.add(token)
    assert stop_text.final() == ("a", True)


# Rows


def row(*strings: str, **sampling: Any) -> Row:
    reader = SimpleNamespace(
        eos_token_ids=frozenset([EOS]), context_length=9999, never_text=[3], decode=decode
    )
    settled = Sampling(stop_strings=strings, **sampling)
    return Row(Request(Encoded([1], [False], []), settled), reader)


def write(running: Row, text: str) -> Iterator[Row]:
    """Let a row take the tokens of a text and then the end, a step at a time."""
    for token in [*encode(text), EOS]:
        if running.finish_reason is None:
            running.take(Draw(token, -float(token)))
            yield running


@often
@given(texts, stops)
def test_streamed_pieces_and_the_completion_agree(text: str, strings: list[str]) -> None:
    running = row(*strings)
    told = list(pieces(write(running, text), decode))
    completion = running.completion()
    assert all(told) and "".join(told) == completion.text == cut(text, strings)
    assert completion.finish_reason == "stop"
    ids = completion.ids
    assert decode(ids).startswith(completion.text)
    assert not ids or not decode(ids[:-1]).startswith(completion.text)
    assert list(ids) == encode(text)[: len(ids)]
    assert completion.logprobs == tuple(-float(token) for token in ids)


def test_a_token_may_hold_the_end_of_the_text_and_of_the_stop_string() -> None:
    the = encode("the")
    assert len(the) == 1
    running = row("he")
    assert list(pieces(write(running, "in the"), decode)) == ["in", " ", "t"]
    completion = running.completion()
    assert completion.text == "in t" and completion.ids == tuple(encode("in the"))
    running = row(" the")
    assert list(pieces(write(running, "in the end"), decode)) == ["in"]
    assert running.completion().ids == tuple(encode("in"))


def test_held_text_is_told_once_it_is_no_stop_string() -> None:
    running = row("###")
    steps = write(running, "a##b")
    found = [step.text for step in steps]
    assert found == ["a", "a", "a", "a##b", "a##b"]


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_an_answer_that_ends_early_tells_what_was_held(reason: Any) -> None:
    running = row("###")
    told = []
    for step in write(running, "a##b"):
        if len(step.ids) == 3:
            step.finish_reason = reason
        told.append(step.text)
    completion = running.completion()
    assert told == ["a", "a", "a##"]
    assert (completion.text, completion.finish_reason) == ("a##", reason)


def test_the_limit_ends_an_answer_inside_a_stop_string() -> None:
    running = row("###", max_new_tokens=3)
    assert "".join(pieces(write(running, "a###"), decode)) == "a##"
    assert running.completion().finish_reason == "length"
    running = row("##", max_new_tokens=3)
    assert "".join(pieces(write(running, "a##"), decode)) == "a"
    assert running.completion().finish_reason == "stop"  # complete at the very limit


def test_a_stop_string_found_at_the_very_end_is_the_reason() -> None:
    running = row("\ufffd", max_new_tokens=3)
    assert "".join(pieces(write(running, "a€"), decode)) == "a"  # two of three bytes
    completion = running.completion()
    assert (completion.text, completion.finish_reason) == ("a", "stop")
    assert len(completion.ids) == 1


# The engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = testing.tiny_llava_folder(tmp_path_factory.mktemp("stops") / "tiny", "qwen2", 1)
    return Engine(*load_checkpoint(folder))


def request(engine: Engine, *strings: str) -> Request:
    prompt = engine.processor.encode([user("what?")], add_generation_prompt=True)
    return Request(prompt, Sampling(20, stop_strings=strings))


def test_answers_of_the_engine_end_before_the_first_stop_string(engine: Engine) -> None:
    (whole,) = engine.generate([request(engine)])
    text = engine.processor.decode(whole.ids)
    assert whole.text is None and len(text) > 8
    cases = [(text[start : start + size],) for start in (0, 3, 6) for size in (1, 2)]
    cases += [("never",), (text[7:9], text[4:6], "never")]
    found = engine.generate([request(engine, *strings) for strings in cases])
    for strings, completion in zip(cases, found, strict=True):
        expected = cut(text, strings)
        assert completion.text == expected
        assert completion.ids == whole.ids[: len(completion.ids)]
        assert completion.finish_reason == ("length" if expected == text else "stop")
        steps = engine.stream(request(engine, *strings))
        assert "".join(pieces(steps, engine.processor.decode)) == expected


def test_rows_without_stop_strings_pay_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    monkeypatch.setattr(engine.processor, "decode", decoded.append)
    engine.generate([request(engine)])
    assert not decoded
