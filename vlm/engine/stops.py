"""Stop strings: an answer ends before the first of them, and nobody sees a part of one.

The first is the one whose last character comes first, so that the end can be told at that
character; of several that end there, the longest. It does not depend on how the text is
cut into tokens.
"""

from collections.abc import Callable, Sequence

from vlm.engine.stream import Detokenizer


class StopScanner:
    """Looks for stop strings in a text that arrives in pieces.

    What may be the beginning of a stop string is held back until it is decided. One
    automaton a string (Knuth, Morris and Pratt 1977): a character costs the same however
    long the strings are.

    Args:
        strings: none of them empty.

    Attributes:
        found: whether a stop string is complete; what comes after it is not looked at.
        held: the end of the text, which may be the beginning of a stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self.held = ""
        self._strings = tuple(strings)
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)

    def add(self, piece: str) -> str:
        """Take more text; return what is now certain to come before any stop string."""
        if self.found:
            return ""
        text = self.held + piece
        for end in range(len(self.held) + 1, len(text) + 1):
            longest = self._step(text[end - 1])
            if longest:
                self.found, self.held = True, ""
                return text[: end - longest]
        certain = len(text) - max(self._matched)
        self.held = text[certain:]
        return text[:certain]

    def _step(self, char: str) -> int:
        """Take a character; return the length of the longest string that it completes, or 0."""
        longest = 0
        for i, string in enumerate(self._strings):
            matched = self._matched[i]
            while matched and string[matched] != char:
                matched = self._borders[i][matched - 1]
            matched += string[matched] == char
            if matched == len(string):
                longest = max(longest, matched)
            self._matched[i] = matched
        return longest


class StopText:
    """The text of one answer up to the first stop string.

    Args:
        strings: none of them empty.
        decode: as for `vlm.engine.stream.Detokenizer`.

    Attributes:
        text: what is certain; it only grows.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.text = ""
        self._strings = strings
        self._scanner = StopScanner(strings)
        self._detokenizer = Detokenizer(decode)

    def add(self, token: int) -> bool:
        """Take one token; return whether a stop string is complete."""
        self.text += self._scanner.add(self._detokenizer.add(token))
        return self._scanner.found

    def final(self) -> tuple[str, bool]:
        """The text of an answer that ends here, and whether a stop string ended it."""
        if self._scanner.found:
            return self.text, True
        # A stop string that is still to be found begins in what is held back, or later.
        scanner = StopScanner(self._strings)
        certain = scanner.add(self._scanner.held + self._detokenizer.rest())
        return self.text + certain + scanner.held, scanner.found


def num_needed(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str]) -> int:
    """How many leading tokens the beginning `text` of their decode comes from."""
    number = len(ids)
    while number and decode(ids[: number - 1]).startswith(text):
        number -= 1
    return number


def _borders(string: str) -> list[int]:
    """For each prefix the length of its longest proper prefix that is a suffix of it."""
    borders = [0] * len(string)
    for i in range(1, len(string)):
        length = borders[i - 1]
        while length and string[i] != string[length]:
            length = borders[length - 1]
        borders[i] = length + (string[i] == string[length])
    return borders
