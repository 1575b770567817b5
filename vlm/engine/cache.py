"""Projected visual tokens, kept by what they were computed from and bounded in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

DEFAULT_CACHE_BYTES = 256 * 2**20
K = TypeVar("K")
V = TypeVar("V")


class FeatureKey(NamedTuple):
    """What an image's visual tokens depend on; any difference is another entry."""

    sha256: str  # of the picture's bytes
    preprocessing: str  # identity of size, crop, mean, ... and backend
    weights: str  # identity of vision tower and projector


class ByteBoundMap(Generic[K, V]):
    """Least-recently-used map whose values' sizes are bounded in sum; for several threads.

    Subclasses hold `_lock` while they touch `_entries`, whose last entry is the most recent.

    Args:
        max_bytes: bound on the sum of the entries' sizes; 0 keeps nothing.
        size: bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self.max_bytes = max_bytes
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept values."""
        return self._nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def _add(self, key: K, value: V) -> None:
        """Keep a value under a new key; the least recently used make room."""
        self._entries[key] = value
        self._nbytes += self._size(value)
        while self._nbytes > self.max_bytes:
            self._remove(next(iter(self._entries)))

    def _remove(self, key: K) -> None:
        self._nbytes -= self._size(self._entries.pop(key))


class FeatureCache(ByteBoundMap[FeatureKey, torch.Tensor]):
    """Projected features (N, D) by `FeatureKey`.

    Entries are copies: a kept row never holds on to the batch that it was computed in, so
    `nbytes` is what the cache really keeps alive.

    Args:
        max_bytes: bound on the sum of the entries' sizes; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        super().__init__(max_bytes, _tensor_bytes)
        self.hits = 0
        self.misses = 0

    def get(self, key: FeatureKey) -> torch.Tensor | None:
        """The features (N, D) of a key, or None; a hit becomes the most recent entry."""
        with self._lock:
            features = self._entries.get(key)
            if features is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end(key)
            return features

    def put(self, key: FeatureKey, features: torch.Tensor) -> None:
        """Keep features (N, D); an entry larger than the whole bound is not kept."""
        with self._lock:
            if _tensor_bytes(features) <= self.max_bytes and key not in self._entries:
                self._add(key, features.detach().clone())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
