"""What answers tell beside their text, through every door of the assistant."""

import math
from typing import Any

import pytest

from vlm import testing
from vlm.answers import to_answer
from vlm.assistant import Assistant
from vlm.engine.request import Completion
from vlm.errors import ConfigError
from vlm.messages import user

PICTURE = testing.draw_image(seed=1)
CHAT = [user("what is it?", PICTURE)]


def test_the_mean_logprob_is_always_told(model: Assistant) -> None:
    (answer,) = model.generate([CHAT], max_new_tokens=20)
    (told,) = model.generate([CHAT], max_new_tokens=20, logprobs=0)
    assert answer.tokens is None and told.tokens is not None
    assert len(told.tokens) == told.num_new_tokens == answer.num_new_tokens
    mean = sum(token.logprob for token in told.tokens) / len(told.tokens)
    assert answer.mean_logprob == pytest.approx(mean, abs=1e-4)
    assert mean < 0 and all(token.alternatives == () for token in told.tokens)


def test_an_empty_answer_has_no_mean(model: Assistant) -> None:
    text = model.ask(PICTURE, "what is it?", max_new_tokens=9)
    (answer,) = model.generate([CHAT], max_new_tokens=9, stop_strings=text[:1], logprobs=1)
    assert (answer.text, answer.num_new_tokens) == ("", 0)
    assert (answer.mean_logprob, answer.tokens) == (None, ())


def test_pieces_join_to_the_text(model: Assistant) -> None:
    (whole,) = model.generate([CHAT], max_new_tokens=40, logprobs=2)
    assert whole.tokens and "".join(token.piece for token in whole.tokens) == whole.text
    for start in range(2, len(whole.text), 5):
        stop = whole.text[start : start + 2]
        (cut,) = model.generate([CHAT], max_new_tokens=40, logprobs=2, stop_strings=stop)
        assert cut.tokens is not None and cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert "".join(token.piece for token in cut.tokens) == cut.text


def test_a_text_may_end_inside_its_last_token(model: Assistant) -> None:
    ids = model.processor.tokenizer.encode("in the", add_special_tokens=False)
    none = ((),) * len(ids)
    completion = Completion(tuple(ids), "stop", 9, (-0.5,) * len(ids), none, "in t")
    answer = to_answer(completion, model.processor)
    assert [token.piece for token in answer.tokens or ()] == ["in", " ", "t"]
    assert (answer.text, answer.num_new_tokens, answer.mean_logprob) == ("in t", 3, -0.5)


def test_greedy_tokens_are_the_first_of_the_alternatives(model: Assistant) -> None:
    (answer,) = model.generate([CHAT], max_new_tokens=30, logprobs=4)
    assert answer.tokens
    for token in answer.tokens:
        values = [value for _, value in token.alternatives]
        assert values == sorted(values, reverse=True) and len(values) == 4
        assert values[0] == token.logprob and math.exp(values[0]) <= 1
        assert all(piece for piece, _ in token.alternatives)
        if token.piece.isascii() and token.piece:
            assert token.alternatives[0][0] == token.piece


def test_a_special_token_is_spelt_as_in_the_vocabulary(model: Assistant) -> None:
    (answer,) = model.generate([CHAT], max_new_tokens=100, logprobs=20)
    spelt = {piece for token in answer.tokens or () for piece, _ in token.alternatives}
    assert spelt & set(testing.SPECIAL_TOKENS)


def test_stop_strings_work_through_every_door(model: Assistant) -> None:
    text = model.ask(PICTURE, "what is it?", max_new_tokens=40)
    options: Any = {"max_new_tokens": 40, "stop_strings": ["nowhere", text[7:9]]}
    expected = text[: text.index(text[7:9])]
    assert expected != text
    assert model.ask(PICTURE, "what is it?", **options) == expected
    assert "".join(model.stream(CHAT, **options)) == expected
    assert list(model.ask_many([(PICTURE, "what is it?")], **options)) == [expected]
    assert model.caption(PICTURE, prompt="what is it?", **options) == expected


def test_every_option_reaches_the_sampler(model: Assistant) -> None:
    usual: Any = {"max_new_tokens": 20, "temperature": 3.0, "seed": 1}
    found = {model.ask(PICTURE, "what is it?", **usual)}
    options = ({"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.9}, {"repetition_penalty": 9.0})
    for option in options:
        found.add(model.ask(PICTURE, "what is it?", **usual, **option))
    assert len(found) == 5
    assert model.ask(PICTURE, "what is it?", **usual, top_k=1) == model.ask(
        PICTURE, "what is it?", max_new_tokens=20
    )


def test_a_string_given_for_the_event_is_told(model: Assistant) -> None:
    wrong: Any = {"stop": "###"}
    with pytest.raises(ConfigError, match=r"'###'.*stop_strings"):
        model.ask(PICTURE, "what?", **wrong)
    with pytest.raises(ConfigError, match=r"'###'.*stop_strings"):
        model.stream(CHAT, **wrong)
