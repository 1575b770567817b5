"""A stand-in for the model whose every step is known, and a served page."""

import itertools
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image

from serve.app import running
from serve.cli import main
from vlm.errors import ImageError
from vlm.images import load_image
from vlm.messages import Message
from vlm.testing import draw_image, tiny_llava_folder

STEP_SECONDS = 0.02
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 850}


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
        keep: bool = False,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        assert stop is not None and keep
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


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The one line of an error of ours."""
        assert (self.code, self.out) == (2, "")
        assert self.err.count("\n") == 1 and self.err.startswith("error: ")
        return self.err.removeprefix("error: ").rstrip()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Run one command line in this process."""

    def command(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["vlm", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Ended(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_llava_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "deep/c.png")):
        draw_image(seed=index).save(folder / name)
    return folder


def unavailable(reason: str) -> NoReturn:
    if os.environ.get("VLM_REQUIRE_BROWSER") == "1":
        pytest.fail(f"VLM_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed: pip install playwright")
    path = "/usr/bin/chromium"
    if not Path(path).exists():
        path = shutil.which("chromium") or shutil.which("google-chrome") or ""
    if not path:
        unavailable("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """One person's tab, which notes every address asked for and every complaint."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(**{"viewport": DESKTOP, **options})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(20_000)
        self.tab.on("request", self._note_request)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", self._note_console)
        self.tab.goto(url)
        self.textbox = self.tab.locator("#box textarea")
        self.textbox.wait_for()

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.elsewhere.append(request.url)

    def _note_console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def attach(self, *pictures: Path) -> None:
        attached = self.tab.locator("#box .thumbnail-item")
        before = attached.count()
        self.tab.set_input_files("#box input[type=file]", [str(path) for path in pictures])
        attached.nth(before + len(pictures) - 1).wait_for()

    def say(self, text: str) -> None:
        self.textbox.fill(text)
        self.textbox.press("Enter")

    def ask(self, text: str) -> str:
        """Ask, and return the whole answer once it has come."""
        before = self.replies.count()
        self.say(text)
        self.replies.nth(before).wait_for()
        self.wait_until_idle()
        return self.last_reply

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Wait for what is true outside of the page, or takes a moment in it."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never came true"
            self.tab.wait_for_timeout(50)

    def wait_until_idle(self) -> None:
        self.tab.locator("#box .submit-button").wait_for()

    @property
    def stop_button(self) -> Any:
        return self.tab.locator("#box .stop-button")

    @property
    def replies(self) -> Any:
        return self.tab.locator("#chat [data-testid=bot]")

    @property
    def last_reply(self) -> str:
        return str(self.replies.last.inner_text()).strip()

    def wait_for_reply(self, pattern: str) -> None:
        self.replies.filter(has_text=re.compile(pattern)).last.wait_for()

    def screenshot(self, name: str) -> None:
        folder = os.environ.get("VLM_SCREENSHOTS")
        if folder:
            self.tab.screenshot(path=f"{folder}/{name}.png")


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Visitor]]:
    """Opens a tab at an address; afterwards nothing was loaded from elsewhere or complained of."""
    visitors: list[Visitor] = []

    def opened(url: str, **options: Any) -> Visitor:
        visitors.append(Visitor(chromium, url, **options))
        return visitors[-1]

    yield opened
    for visitor in visitors:
        # What a page still loads when it is closed is broken off, which it would complain of.
        elsewhere, complaints = list(visitor.elsewhere), list(visitor.complaints)
        visitor.context.close()
        assert elsewhere == []
        assert complaints == []


@pytest.fixture
def visit(open_tab: Callable[..., Visitor], page: str) -> Callable[..., Visitor]:
    """Opens tabs on the stand-in's page."""
    return partial(open_tab, page)
