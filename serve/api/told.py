"""What of an answer that is under way a client has been sent, and what is new since then."""

from collections.abc import Sequence
from typing import Any

from serve.api.desk import Job
from vlm.answers import spell
from vlm.engine.request import Likeliest, Row
from vlm.engine.stream import Detokenizer, Teller
from vlm.processor import Processor
from vlm.relative_processor import RelativeProcessor

AnyProcessor = Processor | RelativeProcessor


class Told:
    """One answer as it goes out, piece by piece.

    Args:
        job: the answer.
        processor: of the model.
        logprobs: send tokens one by one, too.
    """

    def __init__(self, job: Job, processor: AnyProcessor, logprobs: bool) -> None:
        self.job = job
        self.finished = False
        self._processor = processor
        self._text = Teller(processor.decode)
        self._length = 0
        self._tokens = _Tokens(processor) if logprobs else None

    def news(self) -> tuple[str, list[dict[str, Any]] | None]:
        """New text, and its tokens if they were asked for.

        Raises:
            Exception: what ended the answer.
        """
        ended, row = self.job.ended, self.job.row  # in this order: nothing comes after the end
        if ended:
            completion = self.job.result()
        if row is None:
            return "", None
        text = self._text.add(row)
        number, self.finished = len(row.ids), ended
        if ended:
            text += self._text.finish()
            number = len(completion.ids)
        self._length += len(text)
        if self._tokens is None:
            return text, None
        return text, self._tokens.add(row, number, self._length)


class _Tokens:
    """The tokens of one answer, each sent once its text has been.

    With stop strings text is held back, and the last token may be sent in part.
    """

    def __init__(self, processor: AnyProcessor) -> None:
        self._processor = processor
        self._detokenizer = Detokenizer(processor.decode)
        self._waiting: list[tuple[int, str]] = []  # place, piece
        self._sent = 0  # characters

    def add(self, row: Row, number: int, length: int) -> list[dict[str, Any]]:
        """Tokens among the first `number` whose text begins within `length` characters."""
        ids = row.ids[:number]
        for place in range(len(self._detokenizer.ids), len(ids)):
            self._waiting.append((place, self._detokenizer.add(ids[place])))
        sent = []
        while self._waiting and self._waiting[0][0] < number:
            place, piece = self._waiting[0]
            ended = row.finish_reason is not None
            if self._sent + len(piece) > length and not ended:
                break
            self._waiting.pop(0)
            piece = piece[: length - self._sent]
            self._sent += len(piece)
            top = row.top_logprobs[place]
            spelt = [(spell(self._processor, ids[:place], t), value) for t, value in top]
            sent.append(token_entry(piece, row.logprobs[place], spelt))
        return sent


def token_entry(
    piece: str, logprob: float, likeliest: Sequence[tuple[str, float]] | Likeliest
) -> dict[str, Any]:
    """A token as the OpenAI API tells it."""
    return {
        **_token(piece, logprob),
        "top_logprobs": [_token(str(text), value) for text, value in likeliest],
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
