"""A stand-in for the model whose every step is known, and a served page."""

import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from serve.app import running
from vlm.errors import ImageError
from vlm.images import load_image
from vlm.messages import Message

STEP_SECONDS = 0.02


@dataclass(frozen=True)
class Caption:
    """The same fields as vlm.captioning.CaptionResult."""

    path: str
    caption: str | None = None
    error: str | None = None
    code: str | None = None


@dataclass
class StandIn:
    """Answers "<pictures> pictures, <messages> messages: <question>", word by word.

    A question with "forever" never ends by itself; "crash" breaks with a secret in the
    text; "stuck" takes its time after Stop and then says words nobody wants any more.
    """

    name: str = "Stand-in <b>"
    about: str = "Knows nothing & says so."
    device: str = "cpu"
    num_parameters: int = 1_234_567
    examples: Sequence[tuple[Path, str]] = ()
    seen: list[list[Message]] = field(default_factory=list)
    options: list[dict[str, object]] = field(default_factory=list)
    steps: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        stop: threading.Event | None = None,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        assert stop is not None
        self.seen.append(list(messages))
        self.options.append(
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
            }
        )
        self.ended.clear()
        pictures = [image for message in messages for image in message.images]
        for picture in pictures:
            load_image(picture)
        question = messages[-1].text
        if "crash" in question:
            raise RuntimeError("secret-path")
        words = f"{len(pictures)} pictures, {len(messages)} messages: {question}".split(" ")
        try:
            for word in words if "forever" not in question else itertools.repeat("tick"):
                if stop.is_set():
                    break
                time.sleep(STEP_SECONDS)
                self.steps += 1
                yield word + " "
            if stop.is_set() and "stuck" in question:
                time.sleep(0.3)
                yield "STALE "
        finally:
            self.ended.set()

    def caption_many(
        self, paths: Iterable[str], *, prompt: str | None = None, batch_size: int = 16
    ) -> Iterator[Caption]:
        for path in paths:
            time.sleep(STEP_SECONDS)
            try:
                picture = load_image(path)
            except ImageError as error:
                yield Caption(path, error=str(error), code=error.code)
            else:
                yield Caption(path, caption=f"{prompt or 'a picture of'} {picture.size[0]}")


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    example = tmp_path / "example.png"
    Image.new("RGB", (30, 20), "red").save(example)
    return StandIn(examples=[(example, "how red is it?")])


@pytest.fixture
def page(standin: StandIn) -> Iterator[str]:
    """The address of a page on the stand-in."""
    with running(standin, port=0) as url:
        yield url


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my picture.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    return path
