"""A conversation that keeps what it has computed: only new words and pictures are run.

chat = vlm.load().chat()
for piece in chat.send("what is top left?", images=["scene.png"]):
    print(piece, end="")
print(*chat.send("and how many things are there?"))
"""

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from vlm.errors import ContextLengthError, MessageError
from vlm.images import ImageSource, load_image
from vlm.messages import Message, assistant, parse_messages, user

if TYPE_CHECKING:
    from vlm.answers import SamplingOptions
    from vlm.assistant import Assistant


class Chat:
    """One conversation with a model.

    What earlier turns have in common with the next prompt is not computed again, also after
    a turn was edited or an answer is drawn anew. The model's owner keeps it, least recently
    used conversations make room first, and a conversation that had to go is recomputed.

    Args:
        model: answers.
        system: instructions that stand before the conversation.
        trim: let whole turns, oldest first, fall out of a prompt that does not fit; without
            it such a prompt is an error. Pictures go with their turn and are never cut.

    Attributes:
        messages: the conversation so far; may be shortened or replaced by the caller.
    """

    def __init__(
        self, model: "Assistant", system: str | None = None, *, trim: bool = False
    ) -> None:
        self._model = model
        self._system = (
            [Message("system", parse_messages([user(system)])[0].content)] if system else []
        )
        self._trim = trim
        self.messages: list[Message] = []

    def send(
        self,
        text: str,
        images: Sequence[ImageSource] = (),
        *,
        stop: threading.Event | None = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> Iterator[str]:
        """Say something and stream the answer; both are part of the conversation from then on.

        Errors are raised here, before the first piece, and leave the conversation as it was.
        An answer that is not read to its end, or is stopped, stays as far as it came; where
        it says nothing at all, the conversation stays as it was.

        Raises:
            ImageError: a picture cannot be used.
            MessageError: the text is empty.
            ConfigError: a sampling value is out of range.
            ContextLengthError: it does not fit, and trimming does not help or is off.
        """
        draft_to = getattr(self._model.processor, "draft_to", None)  # decoded once, for all turns
        said = user(text, *[load_image(image, draft_to=draft_to) for image in images])
        return self._answer([*self.messages, said], stop, sampling)

    def again(
        self, *, stop: threading.Event | None = None, **sampling: "Unpack[SamplingOptions]"
    ) -> Iterator[str]:
        """Answer the last question anew; the old answer is dropped.

        Raises:
            MessageError: nothing was asked yet.
        """
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise MessageError("nothing was asked yet; use send")
        return self._answer(self.messages[: asked[-1] + 1], stop, sampling)

    def edit(
        self,
        turn: int,
        text: str,
        *,
        stop: threading.Event | None = None,
        **sampling: "Unpack[SamplingOptions]",
    ) -> Iterator[str]:
        """Say the question number `turn` (from 0) in other words; later turns are dropped.

        Its pictures stay.

        Raises:
            MessageError: there is no such question, or the text is empty.
        """
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if not 0 <= turn < len(asked):
            raise MessageError(f"there is no question {turn}; the chat has {len(asked)} of them")
        place = asked[turn]
        said = user(text, *self.messages[place].images)
        return self._answer([*self.messages[:place], said], stop, sampling)

    def _answer(
        self, messages: list[Message], stop: threading.Event | None, sampling: Any
    ) -> Iterator[str]:
        pieces = self._model.stream(self._fitting(messages), stop=stop, keep=True, **sampling)
        return self._record(messages, pieces)

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """The prompt, without its oldest turns where it would not fit."""
        turns = list(messages)
        while True:
            try:
                self._model.prepare([*self._system, *turns])
            except ContextLengthError:
                if not self._trim or len(turns) < 3:
                    raise
                del turns[:2]  # a question and its answer
            else:
                return [*self._system, *turns]

    def _record(self, messages: list[Message], pieces: Iterator[str]) -> Iterator[str]:
        said: list[str] = []
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            if "".join(said).strip():
                self.messages = [*messages, assistant("".join(said))]
