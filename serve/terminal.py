"""Chat in a terminal: the same conversation as in the browser, one line at a time."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from serve.session import ChatModel, ChatSession, Sampling
from serve.transcript import save
from vlm.errors import ConfigError, ImageError
from vlm.images import load_image

HELP = (
    "/image PATH adds a picture, /save FILE keeps the conversation (.md to read, .jsonl to train "
    "from), /reset starts over, /quit ends (also Ctrl-D). Ctrl-C stops."
)


class TerminalChat:
    """A read-answer loop over standard input and output.

    Args:
        model: who answers.
        sampling: how answers are drawn.
        pictures: paths that go along with the first question.
    """

    def __init__(self, model: ChatModel, sampling: Sampling, pictures: Sequence[str] = ()) -> None:
        self._model = model
        self._sampling = sampling
        self._session = ChatSession()
        self._attached = list(pictures)

    def run(self) -> None:
        """Go on until /quit or the end of the input."""
        print(HELP)
        for line in _lines():
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/reset":
                self._session.clear()
                self._attached.clear()
                print("Started over; the pictures are gone too.")
            elif command == "/image":
                self._attach(rest.strip())
            elif command == "/save":
                self._save(rest.strip())
            elif command.startswith("/") and not os.path.exists(command):
                print(f"No command {printable(command)}. {HELP}")
            elif line:
                self._answer(line)

    def _attach(self, path: str) -> None:
        path = os.path.expanduser(path.strip("'\""))
        try:
            picture = load_image(path)
        except ImageError as error:
            print(f"error: {error}")
            return
        self._attached.append(path)
        width, height = picture.pixels.size
        print(f"Added, {width} x {height} pixels; it goes along with your next question.")

    def _save(self, path: str) -> None:
        place = Path(os.path.expanduser(path.strip("'\"")))
        try:
            print(f"{place}: {save(self._session.turns, place)} answers with their questions")
        except ConfigError as error:
            print(f"error: {error}")

    def _answer(self, question: str) -> None:
        self._session.begin(question, self._attached)
        turn = self._session.turns[-1]
        printed = 0
        try:
            for _ in self._session.answer(self._model, self._sampling):
                print(printable(turn.answer[printed:]), end="", flush=True)
                printed = len(turn.answer)
        except KeyboardInterrupt:
            self._session.stop()
            print(" [stopped]", end="")
        if turn.error is not None:
            print(f"error: {turn.error}", end="")
        print()
        # Pictures of a failed question stay with it in the session, unless they were the trouble.
        self._attached.clear()


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # at an empty prompt, as in a shell: a new line
            print()


def printable(text: str) -> str:
    """Text without control characters: an answer must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
