"""A conversation as the list of dicts that a gradio Chatbot draws; no gradio here.

Trap: a Chatbot puts texts into the page as HTML, also with Markdown rendering off (it
removes what could harm, so a typed `<image>` would vanish). Texts are escaped here.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from serve.session import State, Turn

STOPPED = "(stopped)"
NO_ANSWER = "(the model gave no answer)"
WAITING = "\u2026"
ERROR_SIGN = "\u26a0"


def chatbot_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A message for every question and one for its answer, as far as it has come.

    Texts go as explicit text parts: gradio takes the indentation off a bare string.
    """
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": _question(turn)})
        messages.append({"role": "assistant", "content": [_text(_reply(turn))]})
    return messages


def without_folders(text: str | None, paths: Iterable[str]) -> str | None:
    """An error as the page may show it: files by their names, not where the server keeps them."""
    for path in paths:
        text = text and text.replace(f"{Path(path).parent}/", "")
    return text


def _question(turn: Turn) -> list[dict[str, Any]]:
    pictures = [{"path": path} for path in turn.pictures]
    return [*pictures, _text(turn.question)] if turn.question or not pictures else pictures


def _reply(turn: Turn) -> str:
    if turn.state is State.FAILED:
        error = without_folders(turn.error, turn.pictures)
        return f"{turn.answer}\n{ERROR_SIGN} {error}".lstrip("\n")
    if turn.state is State.STOPPED:
        return f"{turn.answer.rstrip()} {STOPPED}".lstrip()
    if turn.answer.strip():
        return turn.answer
    return WAITING if turn.active else NO_ANSWER


def _text(text: str) -> dict[str, Any]:
    """A text part; a lone surrogate, which JSON cannot carry, becomes a question mark."""
    return {"type": "text", "text": escape(text.encode("utf-8", "replace").decode())}
