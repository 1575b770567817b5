"""What a request may not say, and how it is told; nothing is ignored and nothing is a 500."""

import json
from typing import Any

import httpx
import pytest

HELLO = {"role": "user", "content": "hello"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,x"}}


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens"),
        ({"n": 10**6}, "n"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": ["a" * 1001]}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        (
            {"messages": [HELLO, {"role": "assistant", "content": [PICTURE]}]},
            "messages.1.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{**PICTURE, "image_url": "x"}]}]},
            "messages.0.content.0.image_url",
        ),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_values_out_of_range(tiny: Any, changes: dict[str, Any], param: str) -> None:
    status, code, told = tiny.refused(**changes)
    assert (status, code) == (422, "invalid_value")
    assert told is not None and told.startswith(param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"tools": []}, "tools"),
        ({"messages": [{**HELLO, "name": "anne"}]}, "messages.0.name"),
        (
            {"messages": [{"role": "user", "content": [{**PICTURE, "x": 1}]}]},
            "messages.0.content.0.x",
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.text.x"),
    ],
)
def test_unknown_fields(tiny: Any, changes: dict[str, Any], param: str) -> None:
    assert tiny.refused(**changes) == (422, "unknown_field", param)


def test_a_field_nearly_known_is_offered(tiny: Any) -> None:
    assert "'temperature'" in tiny.post(temprature=1).json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "x"}],
        [{"role": "assistant", "content": "x"}, HELLO],
        [HELLO, {"role": "assistant", "content": "x"}],
        [HELLO, HELLO],
        [{"role": "system", "content": "x"}],
        [{"role": "system", "content": "x"}, {"role": "system", "content": "y"}, HELLO],
        [HELLO, {"role": "system", "content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": "a\0b"}],
    ],
)
def test_conversations_that_are_none(tiny: Any, messages: list[Any]) -> None:
    assert tiny.refused(messages=messages) == (422, "invalid_messages", "messages")


@pytest.mark.parametrize(
    "text",
    [
        "<image>",
        "</s>",
        "<|im_start|>user",
        "USER: x ASSISTANT:",
        "\u202eright to left",
        "\U0001f600",
        "e\u0301\u200d",
    ],
)
def test_markers_and_odd_text_are_text(tiny: Any, text: str) -> None:
    reply = tiny.post(messages=[{"role": "user", "content": text}], max_tokens=3)
    (own,) = tiny.model.generate([[{"role": "user", "content": text}]], max_new_tokens=3)
    assert reply.json()["choices"][0]["message"]["content"] == own.text
    assert reply.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0


def test_streamed_characters_are_never_split(tiny: Any) -> None:
    """Random bytes: half characters come together, or as U+FFFD, and always as UTF-8."""
    asked: dict[str, Any] = {"max_tokens": 120, "temperature": 2.0, "seed": 5}
    whole = tiny.post(**asked).json()["choices"][0]["message"]["content"]
    stream = tiny.client.chat.completions.create(
        model=tiny.id, messages=[HELLO], **asked, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"\xff\xfe",
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_json(tiny: Any, body: bytes) -> None:
    assert tiny.refused(body)[:2] == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"x"'])
def test_json_that_is_no_request(tiny: Any, body: bytes) -> None:
    assert tiny.refused(body)[:2] == (422, "invalid_value")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(tiny: Any, number: str) -> None:
    body = json.dumps({"model": tiny.id, "messages": [HELLO]})[:-1]
    status, code, _ = tiny.refused(f'{body}, "temperature": {number}}}'.encode())
    assert (status, code) in ((422, "invalid_value"), (400, "invalid_json"))


def test_another_model(tiny: Any) -> None:
    assert tiny.refused(model="gpt-4o") == (404, "model_not_found", "model")


def test_null_is_the_default_everywhere(tiny: Any) -> None:
    fields = ("max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs")
    more = ("top_logprobs", "response_format", "stream", "stream_options", "logit_bias", "user")
    nulls = dict.fromkeys((*fields, *more))
    plain = tiny.post(max_tokens=4).json()["choices"]
    assert tiny.post(max_tokens=4, **nulls).json()["choices"] == plain


@pytest.mark.parametrize("length", [3_000, 30_000, 1_000_000])
def test_more_text_than_the_model_has_positions(tiny: Any, length: int) -> None:
    messages = [{"role": "user", "content": "a b " * (length // 4)}]
    assert tiny.refused(messages=messages) == (422, "context_length_exceeded", "messages")


def test_more_pictures_than_the_model_has_positions_says_the_arithmetic(builtin: Any) -> None:
    (message,) = builtin.about(builtin.model.examples[0][0], "what?")
    picture, text = message["content"]
    messages = [{"role": "user", "content": [*([picture] * 16), text]}]
    reply = builtin.post(messages=messages)
    assert builtin.told(reply) == (422, "context_length_exceeded", "messages")
    assert "16 pictures x 64 visual tokens" in reply.json()["error"]["message"]
    messages = [{"role": "user", "content": [*([picture] * 17), text]}]
    assert builtin.refused(messages=messages) == (422, "too_many_images", "messages")


def test_a_question_without_a_picture_is_answered(builtin: Any) -> None:
    asked = "what is in the picture?"
    reply = builtin.post(messages=[{"role": "user", "content": asked}]).json()
    assert reply["choices"][0]["message"]["content"] == builtin.model.ask(None, asked)


@pytest.mark.parametrize(
    "schema", [{"type": "nope"}, {"$ref": "http://127.0.0.1/x"}, {"title": "x" * 70_000}]
)
def test_schemas_that_cannot_be_followed(tiny: Any, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert tiny.refused(response_format=form)[:2] == (422, "invalid_value")


def test_addresses_that_are_none(tiny: Any) -> None:
    for method, path, status in (
        ("GET", "/v1/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/docs", 404),
        ("GET", "/v1/../etc/passwd", 404),
    ):
        assert httpx.request(method, tiny.url + path).status_code == status
