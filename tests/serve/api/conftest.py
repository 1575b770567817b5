"""Servers on real models, and clients for them."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import vlm
from serve.app import running
from vlm import testing
from vlm.assistant import Assistant

Content = list[dict[str, Any]]


def data_uri(picture: Path | bytes, kind: str = "image/png") -> str:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def drawn(seed: int, size: tuple[int, int] = (28, 28)) -> bytes:
    """A PNG."""
    out = io.BytesIO()
    testing.draw_image(size, seed=seed).save(out, "PNG")
    return out.getvalue()


def about(picture: Path | bytes, question: str) -> list[dict[str, Any]]:
    """One user message with a picture."""
    part = {"type": "image_url", "image_url": {"url": data_uri(picture)}}
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


@dataclass(frozen=True)
class Api:
    """A running server and the model behind it."""

    url: str
    model: Assistant
    id: str
    data_uri = staticmethod(data_uri)
    drawn = staticmethod(drawn)
    about = staticmethod(about)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, body: Any = None, **changes: Any) -> httpx.Response:
        """A raw request: a small good one with some changes, or any bytes."""
        url = f"{self.url}/v1/chat/completions"
        if isinstance(body, bytes):
            return httpx.post(url, content=body, headers={"content-type": "application/json"})
        whole = {"model": self.id, "messages": [{"role": "user", "content": "hello"}], **changes}
        return httpx.post(url, json=whole)

    def refused(self, *body: Any, **changes: Any) -> tuple[int, str, str | None]:
        """Status, code and param of the error, which has the shape of the OpenAI API."""
        return self.told(self.post(*body, **changes))

    @staticmethod
    def told(reply: httpx.Response) -> tuple[int, str, str | None]:
        assert set(reply.json()) == {"error"}, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "Traceback" not in error["message"] and "/serve/" not in error["message"]
        return reply.status_code, error["code"], error["param"]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.split("{")[0].split()[0] == name)


@pytest.fixture(scope="package")
def builtin() -> Iterator[Api]:
    """The built-in model, which gives right answers."""
    model = vlm.load(device="cpu")
    with running(model, port=0) as url:
        yield Api(url, model, "built-in")


@pytest.fixture(scope="package")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return vlm.load(testing.tiny_llava_folder(tmp_path_factory.mktemp("api") / "tiny", seed=2))


@pytest.fixture(scope="package")
def tiny(tiny_model: Assistant) -> Iterator[Api]:
    """Random weights, which never end an answer by themselves."""
    with running(tiny_model, port=0) as url:
        yield Api(url, tiny_model, tiny_model.name)
