"""Where the model looked, on the chat page: the last answer word by word over its picture."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import gradio as gr
from PIL import Image

from serve.session import ChatSession
from serve.view import without_folders
from vlm.errors import VlmError
from vlm.messages import Message

# The conversation and its last answer, to pictures with the words that they belong to.
Looker = Callable[[Sequence[Message], str], list[tuple[Image.Image, str]]]

_NOTHING = "There is no answer about a picture yet."
_TOLD = "Red is where the words were read off, as a mean of all attention; it gives no reasons."
_MOST = 120  # words of a long answer that are drawn


def looker_of(model: Any) -> Looker | None:
    """How to look, for one of our LLaVAs; None for any other model."""
    if getattr(model, "engine", None) is None:
        return None
    from vlm.engine.runner import Engine

    return partial(_drawn, model) if isinstance(model.engine, Engine) else None


def _drawn(model: Any, messages: Sequence[Message], answer: str) -> list[tuple[Image.Image, str]]:
    from vlm.look_sheet import panels
    from vlm.looking import look

    pictures = [picture for message in messages for picture in message.images]
    drawn = panels(model.processor, pictures, look(model, messages, answer))
    return list(islice(drawn, _MOST))


def add_look(session: gr.State, looker: Looker, *, slots: int) -> None:
    """Put the panel into the surrounding Blocks; `slots` as for `serve.chat_tab.add_chat`."""
    with gr.Accordion("Where it looked", open=False, elem_id="looked"):
        show = gr.Button("Show it for the last answer", size="md", elem_id="look")
        note = gr.Markdown(elem_id="look-note")
        gallery = gr.Gallery(
            columns=6,
            height="auto",
            object_fit="contain",
            show_label=False,
            interactive=False,
            format="png",
            visible=False,
            elem_id="look-words",
        )
    show.click(
        partial(_look, looker),
        session,
        [gallery, note],
        concurrency_limit=slots,
        concurrency_id="answers",
        api_visibility="undocumented",
    )


def _look(looker: Looker, session: ChatSession) -> tuple[Any, str]:
    found = session.last_answer()
    if found is None or not any(message.images for message in found[0]):
        return gr.update(value=[], visible=False), _NOTHING
    messages, answer = found
    try:
        return gr.update(value=looker(messages, answer), visible=True), _TOLD
    except VlmError as error:
        paths = [str(picture) for message in messages for picture in message.images]
        return gr.update(value=[], visible=False), without_folders(str(error), paths) or ""
