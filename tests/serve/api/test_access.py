"""Who may come in: the key on every address but /health, and nobody from another site."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gradio_client import Client

from serve.access import Access, access_for
from serve.app import running
from vlm.assistant import Assistant
from vlm.errors import ConfigError

KEY = "correct-horse-battery"
BEARER = {"authorization": f"Bearer {KEY}"}
HTML = {"accept": "text/html"}
ADDRESSES = [
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/file=/etc/passwd"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/queue/join"),
    ("GET", "/theme.css"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/openapi.json"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/nope"),
    ("GET", "/health/x"),
    ("GET", "/login"),
]


@pytest.fixture(scope="module")
def locked(tiny_model: Assistant) -> Iterator[str]:
    with running(tiny_model, port=0, access=Access(KEY)) as url:
        yield url


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xff".encode("latin-1").decode("latin-1")},
        {"cookie": f"vlm_session={KEY}"},
        HTML,
    ],
)
def test_nothing_without_the_key(
    locked: str, method: str, path: str, headers: dict[str, str]
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    reply = httpx.request(method, locked + path, headers=raw)
    assert reply.status_code == 401
    assert KEY not in reply.text
    if path.startswith("/v1/") and headers is not HTML:
        assert reply.json()["error"]["code"] == "invalid_api_key"


def test_health_is_open(locked: str) -> None:
    assert httpx.get(f"{locked}/health").status_code == 200


@pytest.mark.parametrize("path", ["/", "/config", "/metrics", "/v1/models"])
def test_everything_with_the_key(locked: str, path: str) -> None:
    assert httpx.get(locked + path, headers=BEARER).status_code == 200


def test_the_openai_client_and_gradios_own(locked: str) -> None:
    good = openai.OpenAI(base_url=f"{locked}/v1", api_key=KEY)
    assert good.models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="wrong", max_retries=0).models.list()
    client = Client(locked, headers=BEARER, verbose=False)
    assert client.predict(api_name="/show")[-1] == []


def test_logging_in_on_the_page(locked: str) -> None:
    with httpx.Client(base_url=locked) as browser:
        form = browser.get("/", headers=HTML)
        assert form.status_code == 401 and 'type="password"' in form.text
        assert "not the key" in browser.post("/login", data={"key": "wrong"}).text
        assert browser.get("/config").status_code == 401
        entered = browser.post("/login", data={"key": KEY})
        assert (entered.status_code, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and KEY not in cookie
        assert browser.get("/config").status_code == 200
        assert browser.get("/v1/models").status_code == 200
        assert browser.post("/login", content=b"x" * 5000).status_code == 413


def test_a_browser_logs_in_and_chats(locked: str, chromium: Any) -> None:
    context = chromium.new_context()
    tab = context.new_page()
    tab.set_default_timeout(15_000)
    tab.goto(locked)
    if os.environ.get("VLM_SCREENSHOTS"):
        tab.screenshot(path=f"{os.environ['VLM_SCREENSHOTS']}/log-in.png")
    tab.fill("#key", "wrong")
    tab.click("button")
    tab.get_by_role("alert").wait_for()
    tab.fill("#key", KEY)
    tab.click("button")
    tab.locator("#box textarea").fill("hello")
    tab.locator("#box textarea").press("Enter")
    tab.locator("#chat [data-testid=bot]").first.wait_for()
    if os.environ.get("VLM_SCREENSHOTS"):
        tab.screenshot(path=f"{os.environ['VLM_SCREENSHOTS']}/logged-in.png")
    context.close()


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/gradio_api/queue/join"])
def test_other_sites_may_not_post(tiny: Any, origin: str, path: str) -> None:
    reply = httpx.post(tiny.url + path, json={}, headers={"origin": origin})
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers


def test_a_foreign_name_for_this_machine_reaches_nothing(tiny: Any) -> None:
    for path in ("/v1/models", "/health", "/metrics", "/"):
        assert httpx.get(tiny.url + path, headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    "key", ["", "short", "with a space in it", "schl\u00fcssel-lang", "a\nb" * 9]
)
def test_keys_that_are_none(key: str) -> None:
    with pytest.raises(ConfigError, match="8 printable"):
        Access(key)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.lan"])
def test_an_open_address_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match="--no-auth"):
        access_for(host, None, no_auth=False)
    assert access_for(host, None, no_auth=True) is None
    assert access_for(host, KEY, no_auth=False) is not None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host: str) -> None:
    assert access_for(host, None, no_auth=False) is None


def test_the_command_refuses_before_it_loads_a_model(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    absent = tmp_path / "no-model"
    monkeypatch.delenv("VLM_API_KEY", raising=False)
    assert "--no-auth" in run("serve", "--model", absent, "--host", "0.0.0.0").refused()
    words = ("serve", "--model", absent, "--api-key", KEY)
    assert "exclude" in run(*words, "--no-auth").refused()
    monkeypatch.setenv("VLM_API_KEY", "short")
    assert "8 printable" in run("serve", "--model", absent).refused()
    monkeypatch.setenv("VLM_API_KEY", KEY)
    told = run("serve", "--model", absent, "--host", "0.0.0.0").refused()
    assert "no-model" in told  # the key was there, so the model was looked for
