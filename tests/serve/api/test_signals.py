"""SIGTERM while answers are under way, seen from outside the process."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vlm import testing

SERVER = """
import sys, time
import vlm
from serve.api.limits import Limits
from serve.app import launch
model = vlm.load(sys.argv[1])
advance = model.engine._advance
def slow(*rows):
    time.sleep(0.03)
    advance(*rows)
model.engine._advance = slow
launch(model, port=0, limits=Limits(drain_seconds=float(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(testing.tiny_llava_folder(tmp_path_factory.mktemp("signals") / "tiny", seed=2))


@contextlib.contextmanager
def server(folder: Path, drain_seconds: float, temporary: Path) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(drain_seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        assert process.stdout is not None
        found = None
        while found is None and (line := process.stdout.readline()):
            found = re.search(r" at (http://[\w.:]+)", line)
        assert found is not None
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def body(**changes: Any) -> dict[str, Any]:
    chat = [{"role": "user", "content": "x"}]
    return {"model": "tiny", "messages": chat, "temperature": 2.0, "seed": 1, **changes}


@contextlib.contextmanager
def stream(url: str, max_tokens: int) -> Iterator[Any]:
    """Lines of a stream whose first piece has come."""
    asked = body(stream=True, max_tokens=max_tokens)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=30) as reply:
        lines = reply.iter_lines()
        while '"content":""' in (line := next(lines)) or not line:
            pass
        yield lines


def test_answers_under_way_end_and_nothing_new_is_taken(folder: Path, tmp_path: Path) -> None:
    with server(folder, 20, tmp_path) as (process, url), stream(url, 60) as lines:
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while (health := httpx.get(f"{url}/health")).status_code == 200:
            assert time.monotonic() < deadline
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refused = httpx.post(f"{url}/v1/chat/completions", json=body())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        assert httpx.post(f"{url}/gradio_api/queue/join", json={}).status_code == 503
        rest = list(lines)
        assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
        assert process.wait(10) == 0
    assert not list(tmp_path.glob("vlm-uploads-*"))


def test_answers_that_take_too_long_are_told_so(folder: Path, tmp_path: Path) -> None:
    with server(folder, 0.5, tmp_path) as (process, url), stream(url, 400) as lines:
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert '"code":"draining"' in rest[-2]
        assert process.wait(10) == 0


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path) -> None:
    with server(folder, 60, tmp_path) as (process, url), stream(url, 400):
        assert list(tmp_path.glob("vlm-uploads-*"))
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert not list(tmp_path.glob("vlm-uploads-*"))


def test_nothing_of_what_is_asked_is_logged(folder: Path, tmp_path: Path) -> None:
    with server(folder, 5, tmp_path) as (process, url):
        chat = [{"role": "user", "content": "SECRET"}]
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,SECRET"}}
        wrong = [{"role": "user", "content": [picture, {"type": "text", "text": "SECRET"}]}]
        asked = [
            body(messages=chat, max_tokens=2),
            body(messages=chat, stop=["SECRET"], stream=True, max_tokens=2),
            body(messages=wrong),
            body(messages=chat, SECRET="SECRET"),
        ]
        codes = [httpx.post(f"{url}/v1/chat/completions", json=each).status_code for each in asked]
        assert codes == [200, 200, 400, 422]
        assert httpx.get(f"{url}/v1/SECRET").status_code == 404
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert "Bye." in out and "SECRET" not in out
