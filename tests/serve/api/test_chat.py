"""The official openai client against a running server; the model asked directly is the oracle."""

import asyncio
import itertools
import json
import math
from typing import Any

import httpx
import jsonschema
import openai
import pytest


def questions(builtin: Any) -> list[tuple[Any, str]]:
    asked = [(path, question) for path, question in builtin.model.examples]
    return [*asked, *((path, "describe the picture.") for path, _ in builtin.model.examples)]


def test_models_are_listed(builtin: Any, tiny: Any) -> None:
    for api in (builtin, tiny):
        (listed,) = api.client.models.list().data
        assert listed.id == api.id and listed.owned_by == "vlm"
        assert api.client.models.retrieve(api.id) == listed
    with pytest.raises(openai.NotFoundError):
        tiny.client.models.retrieve("other")


def test_answers_are_those_of_the_model(builtin: Any) -> None:
    for picture, question in questions(builtin):
        reply = builtin.client.chat.completions.create(
            model="built-in", messages=builtin.about(picture, question)
        )
        (choice,) = reply.choices
        assert choice.message.content == builtin.model.ask(picture, question)
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert choice.logprobs is None


def test_usage_counts_visual_tokens(builtin: Any) -> None:
    picture, question = builtin.model.examples[0]
    usage = builtin.client.chat.completions.create(
        model="built-in", messages=builtin.about(picture, question)
    ).usage
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    (answer,) = builtin.model.generate([[{"role": "user", "content": parts}]])
    assert usage.prompt_tokens == answer.num_prompt_tokens
    assert usage.completion_tokens == answer.num_new_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.to_dict()["prompt_tokens_details"]
    assert details["image_tokens"] == builtin.model.processor.num_visual_tokens
    assert sum(details.values()) == usage.prompt_tokens


def test_a_conversation_with_instructions(builtin: Any) -> None:
    picture, _ = builtin.model.examples[1]
    messages = builtin.about(picture, "describe the picture.")
    client = builtin.client.chat.completions
    first = client.create(model="built-in", messages=messages).choices[0].message
    messages += [first, {"role": "user", "content": "is there a taxi in the picture?"}]
    second = client.create(model="built-in", messages=messages).choices[0].message.content
    own = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "describe the picture."},
            ],
        },
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "is there a taxi in the picture?"},
    ]
    assert second == builtin.model.generate([own])[0].text
    for role in ("system", "developer"):
        asked = [{"role": role, "content": "be brief."}, *messages]
        told = client.create(model="built-in", messages=asked).choices[0].message.content
        briefed = [{"role": "system", "content": "be brief."}, *own]
        assert told == builtin.model.generate([briefed])[0].text


def test_a_conversation_that_goes_on_is_kept(builtin: Any) -> None:
    """With an answer in it, it leaves keys and values behind for its next turn; without, none."""
    picture, question = builtin.model.examples[2]
    messages = builtin.about(picture, question)
    prefixes = builtin.model.engine.prefixes
    prefixes.clear()
    builtin.post(messages=messages).raise_for_status()
    assert len(prefixes) == 0
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "sure?"}]
    reply = builtin.post(messages=messages).json()
    assert len(prefixes) == 1
    (kept,) = prefixes._entries.values()
    assert len(kept.tokens) >= reply["usage"]["prompt_tokens"]


def test_a_stream_is_the_same_answer_in_pieces(builtin: Any) -> None:
    picture, _ = builtin.model.examples[1]
    asked = {"model": "built-in", "messages": builtin.about(picture, "describe the picture.")}
    client = builtin.client.chat.completions
    whole = client.create(**asked, logprobs=True, top_logprobs=3)
    chunks = list(
        client.create(
            **asked,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=3,
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *chunks, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    choices = [chunk.choices[0] for chunk in chunks]
    texts = [choice.delta.content or "" for choice in choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(map(bool, texts)) > 3
    assert [c.finish_reason for c in choices if c.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"
    tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == "".join(texts)
    for token in tokens:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob, abs_tol=1e-9)


def test_without_asking_no_usage_chunk(builtin: Any) -> None:
    stream = builtin.client.chat.completions.create(
        model="built-in", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_stop_strings_end_an_answer_before_them(builtin: Any) -> None:
    picture, _ = builtin.model.examples[1]
    asked: dict[str, Any] = {
        "model": "built-in",
        "messages": builtin.about(picture, "describe the picture."),
        "logprobs": True,
    }
    client = builtin.client.chat.completions
    full = client.create(**asked).choices[0].message.content
    stop = full[len(full) // 2 :][:4]
    cut = full[: full.index(stop)]
    for stops in (stop, [stop, "zebra"]):
        whole = client.create(**asked, stop=stops).choices[0]
        assert (whole.message.content, whole.finish_reason) == (cut, "stop")
        choices = [c.choices[0] for c in client.create(**asked, stop=stops, stream=True)]
        assert "".join(c.delta.content or "" for c in choices) == cut
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
        assert tokens == whole.logprobs.content
        assert "".join(t.token for t in tokens) == cut


def test_length_limits_by_both_names(tiny: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        reply = tiny.client.chat.completions.create(
            model=tiny.id, messages=[{"role": "user", "content": "x"}], **{name: 5}
        )
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 5


def test_seeds_and_several_choices(tiny: Any) -> None:
    def ask(**more: Any) -> list[str]:
        reply = tiny.client.chat.completions.create(
            model=tiny.id,
            messages=[{"role": "user", "content": "x"}],
            temperature=1.5,
            max_tokens=12,
            **more,
        )
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        assert reply.usage.completion_tokens == 12 * len(reply.choices)
        return [choice.message.content for choice in reply.choices]

    three = ask(n=3, seed=7)
    assert len(set(three)) == 3
    assert [ask(seed=seed)[0] for seed in (7, 8, 9)] == three
    assert ask(n=3, seed=7) == three
    assert ask()[0] != ask()[0]


def test_choices_stream_side_by_side(tiny: Any) -> None:
    asked: dict[str, Any] = {
        "model": tiny.id,
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 1.5,
        "max_tokens": 12,
        "n": 3,
        "seed": 7,
    }
    texts = ["", "", ""]
    order = []
    for chunk in tiny.client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    whole = tiny.client.chat.completions.create(**asked)
    assert texts == [choice.message.content for choice in whole.choices]
    assert order != sorted(order)


def test_extensions_reach_the_model(tiny: Any) -> None:
    chat = [{"role": "user", "content": "x"}]
    letter = tiny.model.processor.tokenizer.convert_tokens_to_ids("q")
    for api, own in (
        ({"repetition_penalty": 5.0}, {"repetition_penalty": 5.0}),
        ({"logit_bias": {str(letter): 100}}, {"logit_bias": {letter: 100.0}}),
        ({"top_k": 2, "temperature": 1.0, "seed": 3}, {"top_k": 2, "temperature": 1.0, "seed": 3}),
        (
            {"min_p": 0.3, "temperature": 1.0, "seed": 3},
            {"min_p": 0.3, "temperature": 1.0, "seed": 3},
        ),
    ):
        reply = tiny.post(max_tokens=9, **api, messages=chat).json()
        (expected,) = tiny.model.generate([chat], max_new_tokens=9, **own)
        assert reply["choices"][0]["message"]["content"] == expected.text


def test_json_by_a_schema(tiny: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "number": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["colour", "number"],
        "additionalProperties": False,
    }
    for seed in range(3):
        reply = tiny.client.chat.completions.create(
            model=tiny.id,
            messages=[{"role": "user", "content": "x"}],
            temperature=1.5,
            seed=seed,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": schema, "strict": True},
            },
        )
        jsonschema.validate(json.loads(reply.choices[0].message.content), schema)
    reply = tiny.client.chat.completions.create(
        model=tiny.id,
        messages=[{"role": "user", "content": "x"}],
        response_format={"type": "json_object"},
        max_tokens=30,
    )
    assert reply.choices[0].message.content.startswith("{")


def test_a_loop_says_so(tiny: Any) -> None:
    letter = tiny.model.processor.tokenizer.convert_tokens_to_ids("q")
    (choice,) = tiny.post(max_tokens=200, logit_bias={str(letter): 100}).json()["choices"]
    assert choice["message"]["content"] == "q" * 48
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")


def test_many_at_once_are_answered_as_if_alone(builtin: Any) -> None:
    asked = questions(builtin) * 4
    expected = [builtin.model.ask(*each) for each in asked]

    async def one(number: int, client: openai.AsyncOpenAI) -> str:
        messages = builtin.about(*asked[number])
        if number % 2:
            reply = await client.chat.completions.create(model="built-in", messages=messages)
            return str(reply.choices[0].message.content)
        stream = await client.chat.completions.create(
            model="built-in", messages=messages, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with builtin.async_client as client:
            return await asyncio.gather(*(one(i, client) for i in range(len(asked))))

    assert asyncio.run(all_of_them()) == expected


def test_streams_run_together(tiny: Any) -> None:
    """Two long answers advance side by side: neither waits for the other's end."""
    order: list[int] = []

    async def one(number: int, client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model=tiny.id,
            messages=[{"role": "user", "content": "x"}],
            temperature=2.0,
            seed=number,
            max_tokens=150,
            stream=True,
        )
        async for _ in stream:
            order.append(number)

    async def both() -> None:
        async with tiny.async_client as client:
            await asyncio.gather(one(1, client), one(2, client))

    asyncio.run(both())
    assert sum(a != b for a, b in itertools.pairwise(order)) > 20


def test_the_page_and_the_api_share_the_engine(builtin: Any) -> None:
    picture, question = builtin.model.examples[2]
    before = builtin.model.engine.cache.misses
    builtin.post(messages=builtin.about(picture, question)).raise_for_status()
    builtin.model.ask(picture, question)
    assert builtin.model.engine.cache.misses <= before + 1


def test_health_and_metrics(builtin: Any) -> None:
    health = httpx.get(f"{builtin.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "model": "built-in"})
    before = {
        name: builtin.metric(name)
        for name in (
            "vlm_requests_total",
            "vlm_tokens_total",
            "vlm_time_to_first_token_seconds_count",
        )
    }
    picture, question = builtin.model.examples[0]
    reply = builtin.post(messages=builtin.about(picture, question)).json()
    assert builtin.post(n=0).status_code == 422
    after = {name: builtin.metric(name) for name in before}
    assert after["vlm_requests_total"] == before["vlm_requests_total"] + 2
    assert after["vlm_tokens_total"] - before["vlm_tokens_total"] == reply["usage"]["total_tokens"]
    assert (
        after["vlm_time_to_first_token_seconds_count"]
        == 1 + before["vlm_time_to_first_token_seconds_count"]
    )
    assert builtin.metric("vlm_queue_waiting") == builtin.metric("vlm_requests_under_way") == 0
    assert builtin.metric("vlm_feature_cache_hits") > 0
    assert builtin.metric("process_resident_memory_bytes") > 2**20
