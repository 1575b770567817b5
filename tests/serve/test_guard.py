import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serve.guard import MAX_JSON_BYTES, Guard


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


def send(method: str, url: str, *, local_only: bool = True, **options: Any) -> httpx.Response:
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    app = Guard(Starlette(routes=routes), local_only=local_only)

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return await client.request(method, url, **options)

    return asyncio.run(go())


HERE = "http://127.0.0.1:7860"


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "localhost"])
def test_its_own_names_are_answered(host: str) -> None:
    assert send("GET", f"http://{host}/x").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[", ""])
def test_a_foreign_name_for_this_machine_is_refused(host: str) -> None:
    assert send("GET", f"{HERE}/x", headers={"host": host}).status_code == 403


def test_a_server_open_to_the_network_has_names_of_its_own() -> None:
    assert send("GET", "http://box.lan:7860/x", local_only=False).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [(HERE, 200), ("http://evil.example", 403), ("null", 403), ("http://localhost:9999", 403)],
)
@pytest.mark.parametrize("local_only", [True, False])
def test_other_sites_may_not_send(origin: str, status: int, local_only: bool) -> None:
    reply = send("POST", f"{HERE}/x", headers={"origin": origin}, local_only=local_only)
    assert reply.status_code == status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/proxy=http://hf.space/x", 404),
        ("/gradio_api/deep_link?session_hash=x", 404),
        ("/gradio_api/component_server", 404),
        ("/monitoring/summary", 404),
        ("/gradio_api/file=http://169.254.169.254/latest", 403),
        ("/gradio_api/file=https://example.com/x.png", 403),
        ("/gradio_api/file%3Dhttp:%2F%2Fexample.com/x.png", 403),
        ("/gradio_api/file=/tmp/x.png", 200),
        ("/config", 200),
    ],
)
def test_closed_routes(path: str, status: int) -> None:
    assert send("GET", HERE + path).status_code == status


def test_a_body_passes_unchanged() -> None:
    body = {
        "data": [{"text": "see http://a.b/", "files": [{"path": "/tmp/x", "url": "http://u/"}]}]
    }
    assert send("POST", f"{HERE}/q", json=body).json() == body


@pytest.mark.parametrize("path", ["http://10.0.0.1/x", "https://example.com/a.png", "ftp://a/b"])
def test_a_file_given_by_address_is_refused(path: str) -> None:
    body = {"data": [None, {"files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}
    for kind in ("application/json", "text/plain"):  # a form of another kind hides nothing
        reply = send("POST", f"{HERE}/q", content=json.dumps(body), headers={"content-type": kind})
        assert reply.status_code == 400
        assert "upload" in reply.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'"' + b"x" * (MAX_JSON_BYTES - 2) + b'"', 200),
        (b'"' + b"x" * (MAX_JSON_BYTES - 1) + b'"', 413),
    ],
)
def test_odd_bodies(body: bytes, status: int) -> None:
    assert send("POST", f"{HERE}/q", content=body).status_code == status


def test_uploads_are_not_read_here() -> None:
    reply = send("POST", f"{HERE}/q", files={"files": b"x" * (MAX_JSON_BYTES + 1)})
    assert reply.status_code == 200


def test_every_reply_forbids_what_comes_from_elsewhere() -> None:
    headers = send("GET", f"{HERE}/x").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self' data: blob:"
    assert not any(name in policy for name in ("img-src", "connect-src", "font-src"))
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
