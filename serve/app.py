"""The chat page in the browser: `build_app` draws it, `launch` serves it and the API."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Protocol

import gradio as gr

from serve.access import Access
from serve.api.conversation import Fetch
from serve.api.limits import Limits
from serve.api.service import ApiModel, Service
from serve.caption_tab import Captioner, add_captions
from serve.chat_tab import Example, add_chat
from serve.look import Described, header
from serve.look_panel import add_look, looker_of
from serve.server import Served, serving
from serve.session import ChatModel

WAITING_ROOM = 64  # questions that may wait for the model before the page says it is full
ANSWERS_AT_ONCE = 4  # the engine lets them advance in turn, a token each
KEEP_UPLOADS = (3600, 24 * 3600)  # look every hour, delete what is older than a day (seconds)


class PageModel(ChatModel, Captioner, Described, Protocol):
    """What the page needs of `vlm.assistant.Assistant`."""


def build_app(assistant: PageModel) -> gr.Blocks:
    """The page on an assistant, to be served by `launch` or mounted by the caller.

    Pictures go to gradio's upload folder. A caller who serves the page otherwise than
    through `launch` gives up what `serve.guard` and `serve.server` add.
    """
    examples = [Example(*example) for example in getattr(assistant, "examples", ())]
    built_in = bool(getattr(assistant, "built_in", False))
    with gr.Blocks(
        title=f"vlm: {assistant.name}", analytics_enabled=False, delete_cache=KEEP_UPLOADS
    ) as page:
        gr.HTML(header(assistant, built_in=built_in), elem_id="header")
        with gr.Tab("Chat"):
            session = add_chat(assistant, examples, slots=ANSWERS_AT_ONCE)
            looker = looker_of(assistant)
            if looker is not None:
                add_look(session, looker, slots=ANSWERS_AT_ONCE)
        with gr.Tab("Caption"):
            add_captions(assistant)
    page.queue(max_size=WAITING_ROOM)
    return page


@contextmanager
def running(
    assistant: PageModel,
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    access: Access | None = None,
    limits: Limits | None = None,
    fetch: Fetch | None = None,
) -> Iterator[str]:
    """Serve page and API from a thread for as long as the block runs; the value is the address.

    Args:
        assistant: who answers.
        host: the address to listen on; any but a loopback address opens the server to the
            network.
        port: 0 takes a free one.
        access: who may come in; None lets everybody in who can reach the address.
        limits: on what clients of the API may ask for.
        fetch: gets pictures of the API from http(s) addresses; without one these are refused.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    with _serving(assistant, host, port, access, limits, fetch) as served:
        yield served.url


def _serving(
    assistant: PageModel,
    host: str,
    port: int,
    access: Access | None,
    limits: Limits | None,
    fetch: Fetch | None,
) -> AbstractContextManager[Served]:
    service = Service(assistant, limits, fetch) if isinstance(assistant, ApiModel) else None
    return serving(lambda: build_app(assistant), host, port, access=access, service=service)


class Terminated(BaseException):
    """SIGTERM came."""


def launch(
    assistant: PageModel,
    host: str = "127.0.0.1",
    port: int = 7860,
    *,
    access: Access | None = None,
    limits: Limits | None = None,
    fetch: Fetch | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM; arguments and errors as for `running`.

    After SIGTERM answers that are under way may end and nothing new is taken; a second one
    ends the process at once, with code 143.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        with _serving(assistant, host, port, access, limits, fetch) as served:
            print(f"{assistant.name} answers at {served.url} (Ctrl-C ends it)", flush=True)
            if served.service is not None:
                print(f"The OpenAI API is at {served.url}/v1", flush=True)
            try:
                threading.Event().wait()
            except Terminated:
                _drain(served)
    except (KeyboardInterrupt, Terminated):
        print("Bye.", flush=True)


def _drain(served: Served) -> None:
    signal.signal(signal.SIGTERM, lambda *_: _leave(served))
    print("Ending: what is under way may finish, nothing new is taken.", flush=True)
    print("Bye." if served.drain() else "Bye; some answers were cut.", flush=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _leave(served: Served) -> None:
    """End the process now."""
    shutil.rmtree(served.uploads, ignore_errors=True)
    os._exit(128 + signal.SIGTERM)
