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


def pieces(steps: "Iterable[Row]", decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of one answer, piece by piece, none of them empty.

    Args:
        steps: its row after each step, the last time ended.
        decode: as for `Detokenizer`.
    """
    detokenizer = Detokenizer(decode)
    told = 0
    for row in steps:
        text = row.text
        if text is not None:  # with stop strings, the row itself knows what is certain
            if len(text) > told:
                yield text[told:]
            told = len(text)
            continue
        for token in row.ids[len(detokenizer.ids) :]:
            if piece := detokenizer.add(token):
                yield piece
    if rest := detokenizer.finish():
        yield rest
