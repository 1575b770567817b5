"""The chat: events of the page on one side, a `ChatSession` for every visitor on the other.

An event that changes the conversation only notes the change and returns at once. The model
runs in a second, queued event that answers whatever question is waiting by then, so Stop
and the next question never wait for the queue.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from serve.session import ChatModel, ChatSession, Sampling
from serve.view import chatbot_messages
from vlm.errors import ConfigError

PLACEHOLDER = "Drop or paste a picture, and ask"
LONGEST_TEXT = 100_000  # a longer paste becomes an attached file, which is no picture

NOT_ASKED = "Too many are waiting, or a sampling value is out of range. Please try again."

Update = dict[str, Any]


class Example(NamedTuple):
    """A picture file and a question to try on it."""

    image: Path
    question: str


@dataclass(frozen=True)
class _Parts:
    session: gr.State
    chatbot: gr.Chatbot
    box: gr.MultimodalTextbox
    sampling: list[gr.components.Component]

    @property
    def shown(self) -> list[gr.components.Component]:
        return [self.session, self.box, self.chatbot]


def add_chat(model: ChatModel, examples: Sequence[Example], *, slots: int) -> gr.State:
    """Put the chat into the surrounding Blocks; `slots` answers run at the same time.

    Returns:
        Each visitor's `ChatSession`.
    """
    session = gr.State(ChatSession())
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        height="auto",
        render_markdown=False,  # a reply is shown as it is: no HTML, no picture from elsewhere
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=[],
        buttons=[],  # copying would give the escaped text
        feedback_options=None,
        placeholder=_invitation(bool(examples)),
        examples=[
            {"text": e.question, "files": [str(e.image)], "display_text": e.question}
            for e in examples
        ]
        or None,
    )
    box = gr.MultimodalTextbox(
        elem_id="box",
        show_label=False,
        placeholder=PLACEHOLDER,
        file_count="multiple",
        file_types=["image"],
        sources=["upload"],
        max_plain_text_length=LONGEST_TEXT,
        autofocus=True,
    )
    with gr.Row(elem_id="below"):
        sampling = _sampling_controls()
        new_chat = gr.Button("New chat", size="md", min_width=110, scale=0, elem_id="new-chat")
    parts = _Parts(session, chatbot, box, sampling)
    _wire(parts, new_chat, model, slots)
    return session


def _invitation(with_examples: bool) -> str:
    hint = ", or try one of these" if with_examples else ""
    return f"**Drop a picture below and ask about it**{hint}"


def _sampling_controls() -> list[gr.components.Component]:
    default = Sampling()
    with gr.Accordion("Sampling", open=False, elem_id="sampling"), gr.Row():
        return [
            gr.Slider(1, 2048, default.max_new_tokens, step=1, label="Longest answer (tokens)"),
            gr.Slider(
                0, 2, default.temperature, step=0.05, label="Temperature (0: most likely word)"
            ),
            gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top-p"),
            # Not a Number: an empty one turns into 0 when the accordion opens.
            gr.Textbox(label="Seed", placeholder="empty: different each time", max_length=20),
        ]


def _wire(parts: _Parts, new_chat: gr.Button, model: ChatModel, slots: int) -> None:
    def answer(
        session: ChatSession, tokens: float, temperature: float, top_p: float, seed: str | None
    ) -> Iterator[list[dict[str, Any]]]:
        try:
            sampling = Sampling(int(tokens), temperature, top_p, _seed(seed))
        except ConfigError as error:
            session.give_up(str(error))
        else:
            for _ in session.answer(model, sampling):
                yield chatbot_messages(session.turns)
        yield chatbot_messages(session.turns)

    def choose(session: ChatSession, event: gr.SelectData) -> tuple[Any, ...]:
        # The index is the visitor's, the picture and the question are ours.
        example = (parts.chatbot.examples or [])[int(event.index)]
        files: Any = example.get("files", [])
        session.begin(example.get("text", ""), [file["path"] for file in files])
        return _show(session, cleared=True)

    at_once: dict[str, Any] = {
        "outputs": parts.shown,
        "queue": False,
        "show_progress": "hidden",
        "trigger_mode": "multiple",
        "api_visibility": "undocumented",
    }
    asked = [
        parts.box.submit(_ask, [parts.session, parts.box], api_name="ask", **at_once),
        parts.chatbot.example_select(choose, parts.session, api_name="example", **at_once),
        parts.chatbot.retry(_retry, parts.session, api_name="retry", **at_once),
    ]
    for event in asked:
        answered = event.then(
            answer,
            [parts.session, *parts.sampling],
            parts.chatbot,
            concurrency_limit=slots,
            concurrency_id="answers",
            show_progress="hidden",
            # Trap: by default the page drops this event while the one before it is still
            # ending, and the question after a Stop would wait for an answer for ever.
            trigger_mode="multiple",
            api_name="answer",
            api_visibility="undocumented",
        )
        answered.success(_show, parts.session, api_name="show", **at_once)
        answered.failure(_give_up, parts.session, api_name="give_up", **at_once)
    parts.box.stop(_stop, parts.session, api_name="stop", **at_once)
    parts.chatbot.undo(_undo, parts.session, api_name="undo", **at_once)
    parts.chatbot.clear(_clear, parts.session, api_name="clear", **at_once)
    new_chat.click(_clear, parts.session, api_name="new_chat", **at_once)


def _seed(text: str | None) -> int | None:
    if text is None or not text.strip():  # a box that nobody touched sends None
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the seed is {text!r}; write a whole number or nothing") from None


def _ask(session: ChatSession, asked: Update) -> tuple[Any, ...]:
    if asked["text"].strip() or asked["files"]:
        session.begin(asked["text"], asked["files"])
    return _show(session, cleared=True)


def _retry(session: ChatSession) -> tuple[Any, ...]:
    session.retry()
    return _show(session)


def _stop(session: ChatSession) -> tuple[Any, ...]:
    session.stop()
    return _show(session)


def _give_up(session: ChatSession) -> tuple[Any, ...]:
    session.give_up(NOT_ASKED)
    return _show(session)


def _clear(session: ChatSession) -> tuple[Any, ...]:
    session.clear()
    return _show(session)


def _undo(session: ChatSession) -> tuple[Any, ...]:
    turn = session.undo()
    if turn is None:
        return _show(session)
    shown, box, messages = _show(session)
    box["value"] = {"text": turn.question, "files": list(turn.pictures)}
    return shown, box, messages


def _show(session: ChatSession, cleared: bool = False) -> tuple[Any, Update, list[Any]]:
    """Session, text box and messages as the page is to show them now.

    The session is returned, though it is the same object, so that gradio counts it as set
    and forgets it some time after the visitor has left.
    """
    box: Update = gr.update(submit_btn=not session.busy, stop_btn=session.busy)
    if cleared:
        box["value"] = None
    return session, box, chatbot_messages(session.turns)
