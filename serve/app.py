"""The chat page in the browser: `build_app` draws it, `launch` serves it until Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import gradio as gr

from serve.caption_tab import Captioner, add_captions
from serve.chat_tab import Example, add_chat
from serve.look import Described, header
from serve.server import serving
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
            add_chat(assistant, examples, slots=ANSWERS_AT_ONCE)
        with gr.Tab("Caption"):
            add_captions(assistant)
    page.queue(max_size=WAITING_ROOM)
    return page


@contextmanager
def running(assistant: PageModel, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serve the page from a thread for as long as the block runs; the value is its address.

    Args:
        assistant: who answers.
        host: the address to listen on; any but a loopback address opens the page to the
            network, without a password.
        port: 0 takes a free one.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    with serving(lambda: build_app(assistant), host, port) as url:
        yield url


def launch(assistant: PageModel, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until Ctrl-C or SIGTERM; arguments and errors as for `running`."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running(assistant, host, port) as url:
        print(f"{assistant.name} answers at {url} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Bye.", flush=True)
