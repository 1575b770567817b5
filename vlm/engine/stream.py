"""Token ids to pieces of text, never half a character and never a lost one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm.engine.request import Row

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of token ids into pieces whose concatenation is the full decode.

    A byte-level tokenizer may split one character over several tokens; decoding stops
    short then and shows U+FFFD. Such a tail is held back until later tokens complete
    it, or until `finish`.

    Args:
        decode: all ids so far -> text, special tokens left out. The decode of a longer
            list must begin with that of a shorter one, up to a trailing U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._emitted = ""
        self._settled = 0  # how many ids the emitted text stands for

    @property
    def ids(self) -> list[int]:
        """The tokens so far."""
        return self._ids

    @property
    def text(self) -> str:
        """The text emitted so far."""
        return self._emitted

    def add(self, token: int) -> str:
        """Take one token; return the text that is now certain, possibly empty."""
        self._ids.append(token)
        text = self._decode(self._ids).rstrip(REPLACEMENT)
        # A byte-fallback decoder shows a whole run of bytes as U+FFFD while its last
        # character is incomplete, also what was whole a token ago: wait for the rest.
        return self._emit(text) if text.startswith(self._emitted) else ""

    def rest(self) -> str:
        """What `finish` would return now."""
        text = self._decode(self._ids)
        if not text.startswith(self._emitted):
            return self._decode(self._ids[self._settled :])
        return text[len(self._emitted) :]

    def finish(self) -> str:
        """The rest of the text, with U+FFFD where a character was never completed."""
        return self._emit(self._emitted + self.rest())

    def _emit(self, text: str) -> str:
        piece = text[len(self._emitted) :]
        self._emitted = text
        self._settled = len(self._ids)
        return piece


class Teller:
    """The text of one answer as it grows, with stop strings or without.

    Args:
        decode: as for `Detokenizer`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._told = 0

    def add(self, row: "Row") -> str:
        """What is certain by now and was not told before, possibly empty."""
        text = row.text
        if text is not None:  # with stop strings, the row itself knows what is certain
            told, self._told = self._told, len(text)
            return text[told:]
        new = row.ids[len(self._detokenizer.ids) :]
        return "".join([self._detokenizer.add(token) for token in new])

    def finish(self) -> str:
        """The rest, once the row has ended and was added."""
        return self._detokenizer.finish()


def pieces(steps: "Iterable[Row]", decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of one answer, piece by piece, none of them empty.

    Args:
        steps: its row after each step, the last time ended.
        decode: as for `Detokenizer`.
    """
    teller = Teller(decode)
    for row in steps:
        if piece := teller.add(row):
            yield piece
    if rest := teller.finish():
        yield rest
