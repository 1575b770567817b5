"""Token ids to pieces of text, never half a character and never a lost one."""

from collections.abc import Callable, Sequence

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

    def finish(self) -> str:
        """The rest of the text, with U+FFFD where a character was never completed."""
        text = self._decode(self._ids)
        if text.startswith(self._emitted):
            return self._emit(text)
        return self._emit(self._emitted + self._decode(self._ids[self._settled :]))

    def _emit(self, text: str) -> str:
        piece = text[len(self._emitted) :]
        self._emitted = text
        self._settled = len(self._ids)
        return piece
