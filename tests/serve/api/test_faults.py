"""Clients that go away and a model that breaks: nobody else notices, nothing is left behind."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

import vlm
from serve.app import running
from vlm import testing

STEP_SECONDS = 0.03


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Slow:
    """A model whose steps take a while and are counted."""

    def __init__(self, model: Any, url: str) -> None:
        self.model, self.engine, self.url = model, model.engine, url
        self.steps = 0
        self.seconds = STEP_SECONDS
        self.error: Exception | None = None
        self._advance = self.engine._advance
        self.engine._advance = self.advance

    def advance(self, *rows: Any) -> None:
        self.steps += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self._advance(*rows)

    def body(self, **changes: Any) -> dict[str, Any]:
        chat = [{"role": "user", "content": "x"}]
        asked = {"model": self.model.name, "messages": chat, "max_tokens": 300}
        return {**asked, "temperature": 2.0, "seed": 1, **changes}

    def post(self, timeout: float = 20.0, **changes: Any) -> httpx.Response:
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=self.body(**changes), timeout=timeout)

    def stream(self, **changes: Any) -> Any:
        body = self.body(stream=True, **changes)
        return httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.split("{")[0].split()[0] == name)

    @property
    def idle(self) -> bool:
        under_way = self.metric("vlm_requests_under_way")
        return under_way == 0 and len(self.engine.scheduler) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = vlm.load(testing.tiny_llava_folder(tmp_path_factory.mktemp("slow") / "tiny", seed=2))
    with running(model, port=0) as url:
        yield Slow(model, url)


@pytest.fixture
def slow(server: Any) -> Iterator[Any]:
    wait_for(lambda: server.idle)
    server.steps, server.seconds, server.error = 0, STEP_SECONDS, None
    yield server
    server.error = None
    wait_for(lambda: server.idle)


def test_a_client_that_leaves_its_stream_stops_the_model(slow: Any) -> None:
    with slow.stream() as reply:
        for number, _ in enumerate(reply.iter_lines()):
            if number > 6:
                break
        steps = slow.steps
    wait_for(lambda: slow.idle)
    assert slow.steps < steps + 20  # of 300; a busy machine notices late
    stopped = slow.steps
    time.sleep(4 * STEP_SECONDS)
    assert slow.steps == stopped


def test_a_client_that_gives_up_waiting_stops_the_model(slow: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        slow.post(timeout=5 * STEP_SECONDS)
    wait_for(lambda: slow.idle)
    assert slow.steps < 20


def test_a_client_that_leaves_during_its_prefill_gets_no_second_step(slow: Any) -> None:
    slow.seconds = 1.0
    with pytest.raises(httpx.ReadTimeout):
        slow.post(timeout=0.3)
    wait_for(lambda: slow.idle)
    assert slow.steps == 1


def test_a_client_that_leaves_the_queue_is_never_started(slow: Any) -> None:
    slow.engine.scheduler.max_running = 1
    try:
        with slow.stream(seed=1) as first:
            lines = first.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                slow.post(timeout=0.2, seed=2)
            assert len(slow.engine.scheduler.running) == 1
            wait_for(lambda: slow.metric("vlm_requests_under_way") == 1)
            wait_for(lambda: slow.metric("vlm_queue_waiting") == 0)
            assert slow.metric("vlm_queue_running") == 1
    finally:
        slow.engine.scheduler.max_running = 32


def test_who_waits_hears_of_an_error_and_the_next_is_answered(
    slow: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[httpx.Response] = []
    clients = [
        threading.Thread(target=lambda: found.append(slow.post(max_tokens=200))) for _ in range(3)
    ]
    for client in clients:
        client.start()
    wait_for(lambda: slow.metric("vlm_queue_running") == 3)
    with caplog.at_level(logging.ERROR):
        slow.error = RuntimeError("the secret of somebody at /etc/path")
        for client in clients:
            client.join(20)
    assert [reply.status_code for reply in found] == [500] * 3
    for reply in found:
        assert reply.json()["error"]["code"] == "internal_error"
        assert "secret" not in reply.text and "/etc" not in reply.text
    assert "secret" not in caplog.text and "RuntimeError" in caplog.text
    health = httpx.get(f"{slow.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    slow.error = None
    assert slow.post(max_tokens=2).status_code == 200
    assert httpx.get(f"{slow.url}/health").json()["status"] == "ok"


def test_an_error_in_the_middle_of_a_stream_is_told_in_it(slow: Any) -> None:
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0)
    stream = client.chat.completions.create(**slow.body(), stream=True)
    next(iter(stream))
    slow.error = RuntimeError("secret")
    with pytest.raises(openai.APIError, match="something broke"):
        list(stream)


def test_a_step_that_breaks_altogether_ends_its_answers(
    slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def broken() -> bool:
            raise RuntimeError("secret")

        patch.setattr(slow.engine, "step", broken)
        reply = slow.post(max_tokens=5)
        assert reply.status_code == 500 and "secret" not in reply.text
        assert httpx.get(f"{slow.url}/health").status_code == 503
    assert slow.post(max_tokens=2).status_code == 200


def test_two_who_take_turns_get_their_own(slow: Any) -> None:
    """Interleaved seeded answers are those that each gets alone."""
    slow.seconds = 0.0
    alone = [slow.post(max_tokens=40, seed=seed).json()["choices"] for seed in range(4)]
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = slow.post(max_tokens=40, seed=seed).json()["choices"]

    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(20)
    assert [found[seed] for seed in range(4)] == alone
