"""A gradio page as a server of its own: guarded, quiet, gone without a trace when it ends."""

import errno
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.routes import App
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from serve.access import Access, is_loopback
from serve.api.routes import add_api
from serve.api.service import Service
from serve.guard import Guard
from serve.look import HEAD, theme
from vlm.errors import ConfigError
from vlm.images import DEFAULT_LIMITS

MAX_UPLOAD_BYTES = DEFAULT_LIMITS.max_bytes
MAX_VISITORS = 1000
GOODBYE_SECONDS = 2
_LOOK_SECONDS = 0.05
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


@runtime_checkable
class Stoppable(Protocol):
    """Per-visitor state with work under way."""

    def stop(self) -> None:
        """End it soon."""


def guarded(
    page: gr.Blocks,
    *,
    local_only: bool,
    access: Access | None = None,
    service: Service | None = None,
) -> FastAPI:
    """The page as an ASGI application behind `serve.guard.Guard`, the API beside it."""
    guard = Middleware(
        Guard,
        local_only=local_only,
        access=access,
        is_draining=lambda: service is not None and service.draining,
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=[guard])
    if service is not None:
        add_api(app, service)
    # Trap: gradio checks that a file named by a client was uploaded by one only if this is
    # set, and mounting does not set it. Without it any file here could be read.
    page.has_launched = True
    page.state_session_capacity = MAX_VISITORS
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(),
        head=HEAD,
        footer_links=["settings"],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=MAX_UPLOAD_BYTES,
    )
    _page_of(app).add_exception_handler(OSError, _disk_full)
    return app


async def _disk_full(request: Request, error: Exception) -> PlainTextResponse:
    """What to tell somebody whose upload finds no room; other errors stay what they are."""
    if getattr(error, "errno", None) not in _NO_ROOM:
        raise error
    log.error("an upload found no room on the disk")
    for torn in Path(os.environ["GRADIO_TEMP_DIR"]).iterdir():  # whole ones are in folders
        if torn.is_file():
            torn.unlink(missing_ok=True)
    return PlainTextResponse("The server's disk is full; try again later.", 507)


def _page_of(app: FastAPI) -> App:
    mounts = (route.app for route in app.routes if isinstance(route, Mount))
    return next(app for app in mounts if isinstance(app, App))


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        url: its address.
        uploads: the folder of the page's files.
        service: the API behind it, if there is one.
    """

    url: str
    uploads: str
    service: Service | None

    def drain(self) -> bool:
        """Refuse what is new and wait for what is under way; whether all of it has ended."""
        if self.service is None:
            return True
        self.service.draining = True
        deadline = time.monotonic() + self.service.limits.drain_seconds
        while self.service.busy:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True


@contextmanager
def serving(
    build: Callable[[], gr.Blocks],
    host: str,
    port: int,
    *,
    access: Access | None = None,
    service: Service | None = None,
) -> Iterator[Served]:
    """Serve a page, and the API beside it, from a thread.

    Uploads live in a folder that only this user can read, and are deleted at the end.

    Args:
        build: draws the page; called once the folder for uploads is set.
        host: the address to listen on.
        port: 0 takes a free one.
        access: who may come in; None lets everybody in.
        service: of the API; None serves the page alone.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    with (
        _listen(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="vlm-uploads-") as folder,
        _environment("GRADIO_TEMP_DIR", folder),
    ):
        app = guarded(build(), local_only=is_loopback(host), access=access, service=service)
        server = _Server(app)
        thread = threading.Thread(target=server.run, args=([listener],), name="vlm-page")
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                thread.join(0.01)
            yield Served(_address(host, listener), folder, service)
        finally:
            if service is not None:
                service.refuse()
            server.should_exit = True
            thread.join()
            if service is not None:
                service.close()


class _Server(uvicorn.Server):
    """Ends what is under way before it closes, so that open pages do not hold it up."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=GOODBYE_SECONDS,
            )
        )
        self._page = _page_of(app)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for visitor in list(self._page.state_holder.session_data.values()):
            for state in list(visitor.state_data.values()):
                if isinstance(state, Stoppable):
                    state.stop()
        self._page.stop_event.set()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot serve at {host}:{port}: {reason}; try vlm serve --host 127.0.0.1 --port 7861"
        ) from error
    return listener


def _address(host: str, listener: socket.socket) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listener.getsockname()[1]}"


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while: gradio takes its upload folder from one."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
