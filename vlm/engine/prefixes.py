"""Keys and values of earlier prompts, so that what two prompts share is computed once.

The next turn of a chat begins with all earlier ones, an edited turn with those before it,
and every caption with the same system text. All are served by one store: a prompt takes
over the longest beginning that it shares with a kept sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.engine.cache import ByteBoundMap, FeatureKey
from vlm.engine.slots import Layers

DEFAULT_PREFIX_BYTES = 2**30


def token_keys(ids: Sequence[int], image_token: int, pictures: Sequence[FeatureKey]) -> np.ndarray:
    """A number for each position: a text token's id, a visual token's picture and place in it.

    Two sequences with the same numbers have the same keys and values: a picture's number
    comes from its bytes, its preprocessing and the weights that encode it.

    Args:
        ids: of a prompt, the image token repeated for each visual token.
        image_token: its id.
        pictures: in the order of their visual tokens, all of the same number of tokens.
    """
    keys = np.array(ids, dtype=np.int64)
    places = np.flatnonzero(keys == image_token)
    if len(pictures):
        size = len(places) // len(pictures)
        for i, picture in enumerate(pictures):
            digest = hashlib.sha256("\0".join(picture).encode()).digest()
            base = -(int.from_bytes(digest[:7], "big") + 1)  # below zero, where no id is
            keys[places[i * size : (i + 1) * size]] = base - np.arange(size)
    return keys


def shared_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading numbers are equal."""
    size = min(len(first), len(second))
    different = np.flatnonzero(first[:size] != second[:size])
    return int(different[0]) if len(different) else size


@dataclass
class Kept:
    """A sequence and its keys and values (G, S, E), layer by layer.

    Attributes:
        spare: whether what lies behind them in memory is still nobody's.
    """

    tokens: np.ndarray
    layers: Layers
    spare: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with the room behind them."""
        return sum(t.untyped_storage().nbytes() for pair in self.layers for t in pair)


class PrefixStore(ByteBoundMap[bytes, Kept]):
    """Sequences with their keys and values, by their numbers.

    Args:
        max_bytes: of all kept keys and values; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_PREFIX_BYTES) -> None:
        super().__init__(max_bytes, lambda kept: kept.nbytes)

    def match(self, tokens: np.ndarray) -> tuple[int, Kept | None]:
        """The kept sequence that shares most with the beginning of `tokens`, and how much."""
        with self._lock:
            best, found = 0, None
            for name, entry in self._entries.items():
                length = shared_length(entry.tokens, tokens)
                if length > best:
                    best, found = length, name
            if found is None:
                return 0, None
            self._entries.move_to_end(found)
            return best, self._entries[found]

    def claim(self, kept: Kept) -> bool:
        """Whether the memory behind a kept sequence is the caller's from now on: once only."""
        with self._lock:
            free, kept.spare = kept.spare, False
            return free

    def keep(self, tokens: np.ndarray, layers: Layers) -> None:
        """Keep a sequence; kept sequences that it begins with are dropped for it."""
        entry = Kept(tokens, layers)
        with self._lock:
            if entry.nbytes > self.max_bytes:
                return
            inner = [
                name
                for name, old in self._entries.items()
                if shared_length(old.tokens, tokens) == len(old.tokens)
            ]
            for name in inner:
                self._remove(name)
            self._add(tokens.tobytes(), entry)
