"""The values of a JSON list of any length, one at a time, as `json` has them.

`ijson` turns half of a surrogate pair into a question mark, silently; `json` keeps it, so
that whoever checks the text can refuse it.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_recipes.formats.faults import FaultError

_CHUNK = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = "0123456789.eE+-"  # and nothing, which is in every text
_LONGEST_LITERAL = 12  # `\ud83d\ude00`, `-Infinity`: what may be cut at the end of a chunk


def list_items(file: BinaryIO) -> Iterator[Any]:
    """Stream the values; memory holds one of them, or a chunk of the file.

    Raises:
        FaultError: ``malformed``, ``truncated`` or ``encoding``; values before it were given.
    """
    return _List(file).items()


class _List:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._line = "", 0, 1
        self._num_bytes = 0
        self._bad: str | None = None

    def items(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() != "]":
            yield self._value()
            while self._peek() == ",":
                self._at += 1
                yield self._value()
        self._expect("]")
        if self._peek():
            raise self._error("text behind the end of the list", "malformed", self._at)

    def _expect(self, sign: str) -> None:
        if self._peek() != sign:
            code = "malformed" if self._at < len(self._text) else "truncated"
            raise self._error(f"no {sign!r} where one must be", code, self._at)
        self._at += 1

    def _peek(self) -> str:
        """The next sign behind white space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated")
                may_go_on = is_open or error.pos >= len(self._text) - _LONGEST_LITERAL
                if may_go_on and self._more():
                    continue
                is_cut = is_open or not self._text[error.pos :].strip()
                code = "truncated" if is_cut else "malformed"
                raise self._error(error.msg, code, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply", "malformed", self._at) from error
            if self._text[end : end + 1] in _NUMBER and self._more():  # it may go on
                continue
            self._at = end
            return value

    def _more(self) -> bool:
        """Read on, twice as much as is waiting; False at the end of the file."""
        if self._bad:
            raise self._error(self._bad, "encoding", len(self._text))
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            at = self._num_bytes + len(data) - len(error.object) + error.start
            self._bad = f"byte {at} is {error.object[error.start]:#04x}"
        if not data and not self._bad:
            return False  # the text is as it was
        self._num_bytes += len(data)
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + text, 0
        return True

    def _error(self, reason: str, code: str, at: int) -> FaultError:
        line = self._line + self._text.count("\n", 0, at)
        return FaultError(f"{reason}, line {line}", code, line)


_decode = json.JSONDecoder().raw_decode
