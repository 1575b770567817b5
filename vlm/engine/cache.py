"""Projected visual tokens, kept by what they were computed from and bounded in bytes."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import torch

DEFAULT_CACHE_BYTES = 256 * 2**20


class FeatureKey(NamedTuple):
    """What an image's visual tokens depend on; any difference is another entry."""

    sha256: str  # of the picture's bytes
    preprocessing: str  # identity of size, crop, mean, ... and backend
    weights: str  # identity of vision tower and projector


class FeatureCache:
    """Least-recently-used map from `FeatureKey` to features (N, D), bounded in bytes.

    Safe to share between threads. Entries are copies: a kept row never holds on to the
    batch that it was computed in, so `nbytes` is what the cache really keeps alive.

    Args:
        max_bytes: bound on the sum of the entries' sizes; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[FeatureKey, torch.Tensor] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept features."""
        return self._nbytes

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
        size = features.numel() * features.element_size()
        with self._lock:
            if size > self.max_bytes or key in self._entries:
                return
            self._entries[key] = features.detach().clone()
            self._nbytes += size
            while self._nbytes > self.max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._nbytes -= oldest.numel() * oldest.element_size()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0
