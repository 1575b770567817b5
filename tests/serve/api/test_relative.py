"""A model that is not ours behind the same API: by its own `generate`, one answer at a time."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers as hf

import vlm
from serve.app import running
from vlm import testing

CHAT = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT of random weights, by transformers' own classes."""
    folder = tmp_path_factory.mktemp("relative") / "next"
    grids = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextConfig(
        vision_config=testing.tiny_vision_config(),
        text_config=testing.tiny_text_config(),
        image_token_index=testing.SPECIAL_TOKENS.index("<image>"),
        image_grid_pinpoints=grids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = hf.LlavaNextForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    square = {"height": 28, "width": 28}
    images = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=grids
    )
    tokenizer = testing.byte_tokenizer()
    hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def relative(folder: Path) -> Iterator[Any]:
    model = vlm.load(folder)
    with running(model, port=0) as url:
        yield model, url


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "next", "messages": CHAT, "max_tokens": 12, **changes}


def test_answers_whole_and_streamed(relative: Any, tiny: Any) -> None:
    model, url = relative
    messages = tiny.about(tiny.drawn(1, (56, 28)), "what?")
    reply = httpx.post(f"{url}/v1/chat/completions", json=body(messages=messages)).json()
    parts = [{"type": "image", "image": tiny.drawn(1, (56, 28))}, {"type": "text", "text": "what?"}]
    (own,) = model.generate([[{"role": "user", "content": parts}]], max_new_tokens=12)
    assert reply["choices"][0]["message"]["content"] == own.text
    assert reply["usage"]["prompt_tokens"] == own.num_prompt_tokens
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] > 4
    asked = body(messages=messages, stream=True)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as stream:
        lines = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    text = "".join(line["choices"][0]["delta"].get("content") or "" for line in lines)
    assert text == own.text and lines[-1]["choices"][0]["finish_reason"] == "length"


def test_several_at_once_and_held_to_a_schema(relative: Any) -> None:
    model, url = relative
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red"]}}}

    async def ask() -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = [body(temperature=2.0, seed=i) for i in range(4)]
            asked.append(body(response_format=form))
            posts = [client.post("/v1/chat/completions", json=each) for each in asked]
            return [(await each).json() for each in asyncio.as_completed(posts)]

    texts = {reply["choices"][0]["message"]["content"] for reply in asyncio.run(ask())}
    own = {
        model.generate([CHAT], max_new_tokens=12, temperature=2.0, seed=i)[0].text for i in range(4)
    }
    assert texts == own | {'"red"'}


def test_a_client_that_leaves_frees_the_model(
    relative: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, url = relative
    forward, steps = model.engine.model.forward, []

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(0.03)
        steps.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(model.engine.model, "forward", slow)
    endless = {str(token): -100 for token in model.processor.eos_token_ids}
    asked = body(max_tokens=300, temperature=2.0, logit_bias=endless)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=0.3)
    reply = httpx.post(f"{url}/v1/chat/completions", json=body(max_tokens=1), timeout=30)
    assert reply.status_code == 200 and len(steps) < 60


def test_a_model_that_breaks(relative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, url = relative
    with monkeypatch.context() as patch:

        def broken(*args: Any, **options: Any) -> Any:
            raise RuntimeError("secret")

        patch.setattr(model.engine.model, "forward", broken)
        reply = httpx.post(f"{url}/v1/chat/completions", json=body())
        assert reply.status_code == 500 and "secret" not in reply.text
        assert httpx.get(f"{url}/health").status_code == 503
    assert httpx.post(f"{url}/v1/chat/completions", json=body()).status_code == 200
    assert httpx.get(f"{url}/health").status_code == 200
