"""One person's conversation: what was asked and answered, and what the model is told of it.

No gradio and no torch: the page draws what it finds here, and a test needs no browser.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Protocol

from vlm.errors import ContextLengthError, ImageError, VlmError
from vlm.messages import Message, assistant, parse_messages, user

log = logging.getLogger(__name__)

INTERNAL_ERROR = "Something broke inside the server; its log has the details. You can go on asking."


class ChatModel(Protocol):
    """What a conversation needs of `vlm.assistant.Assistant`."""

    def stream(
        self,
        messages: Sequence[Message],
        *,
        stop: threading.Event | None = None,
        keep: bool = False,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int | None = ...,
    ) -> Iterator[str]:
        """Pieces of the answer to the last message; ends soon after `stop` is set."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: temperature 0 is greedy, and `seed` None differs each time."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class State(Enum):
    """Where a turn stands; the first two are still to end."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(eq=False)
class Turn:
    """One question with the pictures attached to it, and as much of the answer as there is."""

    question: str
    pictures: tuple[str, ...] = ()
    answer: str = ""
    error: str | None = None
    state: State = State.WAITING
    pictures_are_bad: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def active(self) -> bool:
        """Whether an answer is still to come."""
        return self.state in (State.WAITING, State.RUNNING)

    @property
    def answered(self) -> bool:
        """Whether there is an answer, be it half, for the model to remember."""
        return self.state in (State.DONE, State.STOPPED) and bool(self.answer.strip())

    def fail(self, error: str, *, pictures_are_bad: bool = False) -> None:
        """Close the turn with a text for the person to read; one that ended stays as it is."""
        if self.active:
            self.error, self.state, self.pictures_are_bad = error, State.FAILED, pictures_are_bad


class ChatSession:
    """The turns of one chat, oldest first, shared by the threads that serve one page.

    At most one turn is active. Each turn has its own stop event and keeps its own text, so
    a model that is slow to stop cannot write into the answer to a later question.
    """

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ChatSession":
        """An empty chat: a page keeps one as a pattern and copies it for every visitor."""
        return ChatSession()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far."""
        with self._lock:
            return tuple(self._turns)

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return any(turn.active for turn in self.turns)

    def begin(self, question: str, pictures: Sequence[str] = ()) -> None:
        """Note a question to be answered next; what was still being answered stops."""
        with self._lock:
            self.stop()
            self._turns.append(Turn(question, tuple(pictures)))

    def stop(self) -> None:
        """End the active turn now, and tell the model; what it said so far stays."""
        with self._lock:
            for turn in self._turns:
                if turn.active:
                    turn.state = State.STOPPED
                turn.stop.set()

    def give_up(self, error: str) -> None:
        """Close the waiting question with a text: nobody is coming to answer it."""
        turn = self._claim()
        if turn is not None:
            turn.fail(error)

    def clear(self) -> None:
        """Stop, and forget everything."""
        with self._lock:
            self.stop()
            self._turns.clear()

    def undo(self) -> Turn | None:
        """Stop, take the last turn off, and return it; None in an empty chat."""
        with self._lock:
            self.stop()
            return self._turns.pop() if self._turns else None

    def retry(self) -> None:
        """Ask the last question once more, in place of its present answer."""
        with self._lock:
            turn = self.undo()
            if turn is not None:
                self.begin(turn.question, turn.pictures)

    def answer(self, model: ChatModel, sampling: Sampling) -> Iterator[None]:
        """Answer the waiting question, if there is one; yields whenever there is news.

        Nothing is raised for a question that fails: the turn holds the error's text and
        the chat goes on. Closing this iterator early stops the model.
        """
        turn = self._claim()
        if turn is None:
            return
        try:
            yield from self._run(turn, model, sampling)
        except VlmError as error:
            bad = isinstance(error, ImageError | ContextLengthError)
            turn.fail(str(error), pictures_are_bad=bad)
        except Exception:  # this chat is not to die of it, and no other one either
            log.exception("answering failed")
            turn.fail(INTERNAL_ERROR)
        finally:
            with self._lock:
                if turn.active:
                    turn.state = State.STOPPED
                turn.stop.set()

    def last_answer(self) -> tuple[list[Message], str] | None:
        """The newest answer behind the conversation that it was given to, if there is one."""
        with self._lock:
            turn = next((turn for turn in reversed(self._turns) if turn.answered), None)
            return None if turn is None else (self._messages(turn), turn.answer)

    def _claim(self) -> Turn | None:
        with self._lock:
            waiting = next((t for t in self._turns if t.state is State.WAITING), None)
            if waiting is not None:
                waiting.state = State.RUNNING
            return waiting

    def _run(self, turn: Turn, model: ChatModel, sampling: Sampling) -> Iterator[None]:
        pieces = model.stream(
            parse_messages(self._messages(turn)),
            stop=turn.stop,
            keep=True,  # the next turn computes only what is new
            **asdict(sampling),
        )
        for piece in pieces:
            with self._lock:
                if not turn.active:
                    return
                turn.answer += piece
            yield
        with self._lock:
            if turn.active:
                turn.state = State.DONE

    def _messages(self, last: Turn) -> list[Message]:
        """The conversation up to the question of `last`.

        Questions without an answer are left out, but their pictures go along with the next
        question, since they are still to be seen on the page; unless they were the trouble.
        """
        messages: list[Message] = []
        carried: tuple[str, ...] = ()
        for turn in self.turns:
            if turn is last:
                break
            pictures = carried + turn.pictures
            if turn.answered:
                messages += [user(turn.question, *pictures), assistant(turn.answer)]
                carried = ()
            elif not turn.pictures_are_bad:
                carried = pictures
        return [*messages, user(last.question, *carried, *last.pictures)]
