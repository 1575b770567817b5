"""What may reach the page's server, and what the page may reach: one ASGI middleware.

gradio serves a trusted public demo by default. A chat on somebody's own machine wants
less: no other web site talks to it, it fetches no address that a client names, and the
page loads nothing from anywhere else, whatever a model writes into it.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access import LOGIN_PATH, MAX_LOGIN_BYTES, OPEN_PATHS, Access
from serve.api.problems import ApiError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_JSON_BYTES = 2 * 2**20

# Parts of gradio that this product has no use for: a proxy to other servers, copies of a
# visitor's page on disk, editors, statistics, and functions of single components.
CLOSED = (
    "/gradio_api/proxy=",
    "/gradio_api/deep_link",
    "/gradio_api/component_server",
    "/gradio_api/process_recording",
    "/gradio_api/run-history",
    "/gradio_api/runs",
    "/gradio_api/vibe",
    "/gradio_api/undo-vibe",
    "/gradio_api/dev/",
    "/monitoring",
)
FILE_ROUTE = "/gradio_api/file"
API_ROUTE = "/v1/"
ASKING = ("/gradio_api/queue/join", "/gradio_api/upload")

SAFE_HEADERS = {
    # gradio's own page needs inline scripts and eval; nothing may come from elsewhere.
    "Content-Security-Policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": a browser would send the form of the log-in with a null origin.
    "Referrer-Policy": "same-origin",
}


class Guard:
    """Lets through what a browser on the page itself and clients of the API send, little else.

    Args:
        app: the application behind.
        local_only: refuse a `Host` other than the loopback names, so that a foreign site
            whose name is made to resolve to 127.0.0.1 reaches nothing (DNS rebinding).
        access: who may come in; None lets everybody in.
        is_draining: whether the page is to take no new questions; the API tells by itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        local_only: bool = True,
        access: Access | None = None,
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self.app = app
        self.local_only = local_only
        self.access = access
        self.is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve, or refuse with a short text."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        send = _safer(send)
        refusal = self._refusal(scope["path"], headers)
        if refusal is None and self.access is not None:
            refusal = await self._stranger(self.access, scope, headers, receive)
        body = None
        if refusal is None and _has_json(scope, headers):
            body = await _read(receive, MAX_JSON_BYTES)
            refusal = _refused_body(body)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive if body is None else _replay(body, receive), send)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if self.local_only and _host_name(host) not in LOOPBACK_NAMES:
            return _refuse(path, 403, "This server answers to its own machine only.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _refuse(path, 403, "Requests from other sites are refused.")
        if path.startswith(CLOSED) or any(char < " " for char in path):  # a line break hides both
            return _refuse(path, 404, "Not found")
        if path.startswith(FILE_ROUTE) and "://" in path:
            return _refuse(path, 403, "Addresses are not fetched.")
        if path.startswith(ASKING) and self.is_draining():
            return PlainTextResponse("The server is about to end.", 503, {"Retry-After": "2"})
        return None

    async def _stranger(
        self, access: Access, scope: Scope, headers: Headers, receive: Receive
    ) -> Response | None:
        """What to tell somebody who has not shown the key; None for those who have."""
        path = scope["path"]
        if path == LOGIN_PATH and scope["method"] == "POST":
            form = await _read(receive, MAX_LOGIN_BYTES)
            return _refuse(path, 413, "Too long") if form is None else access.log_in(form, headers)
        if path in OPEN_PATHS or access.admits(headers):
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return access.form()
        return _refuse(path, 401, "Send the key of this server as a Bearer token, or log in at /.")


def _refuse(path: str, status: int, text: str) -> Response:
    if not path.startswith(API_ROUTE):
        return PlainTextResponse(text, status)
    code = {401: "invalid_api_key", 403: "forbidden"}.get(status, "not_found")
    return ApiError(status, code, text).response()


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _has_json(scope: Scope, headers: Headers) -> bool:
    """Whether the page's own rules for bodies are to be held; the API has its own."""
    if scope["path"].startswith(API_ROUTE):
        return False
    kind = headers.get("content-type", "")
    return scope["method"] == "POST" and not kind.startswith("multipart/form-data")


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None as soon as it is longer than the limit."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > limit:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _refused_body(body: bytes | None) -> PlainTextResponse | None:
    if body is None:
        return PlainTextResponse("The request is too long.", 413)
    try:
        named = bool(body) and _names_an_address(json.loads(body))
    except (ValueError, RecursionError):
        return PlainTextResponse("The request is not JSON.", 400)
    if named:
        return PlainTextResponse("Addresses are not fetched: upload the picture.", 400)
    return None


def _names_an_address(value: Any) -> bool:
    """Whether a file is given by address: gradio would fetch it from the server's side."""
    if isinstance(value, Mapping):
        path = value.get("path")
        return (isinstance(path, str) and "://" in path) or any(
            _names_an_address(item) for item in value.values()
        )
    return isinstance(value, list) and any(_names_an_address(item) for item in value)


def _safer(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in SAFE_HEADERS.items():
                headers[name] = value
        await send(message)

    return with_headers
