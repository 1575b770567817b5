"""In which order the records of several sources come: a function of sizes, counts and seed.

Nothing else goes in, so another machine, another number of processes or a later start give
the same. Only integer hashes and IEEE divisions are used, no library's random numbers, which
may change between versions.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.errors import ConfigError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
Bits = NDArray[np.uint64]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to weights that add up to `total`, by largest remainder.

    >>> shares([2, 1, 1], 10)
    [5, 3, 2]
    """
    exact = [total * weight / math.fsum(weights) for weight in weights]
    counts = [math.floor(each) for each in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def draw(
    sizes: Sequence[int], counts: Sequence[int], seed: int, shuffle: bool
) -> NDArray[np.int64]:
    """The order of a mixture.

    Each source is spread evenly: among the first n records it has its share of n, within one
    more than the number of sources. All of its records come once before any comes again.

    Args:
        sizes: records of each source.
        counts: how many are taken of it.
        seed: of the order.
        shuffle: false keeps each source's own order.

    Returns:
        N record numbers, counted through the sources one after the other.

    Raises:
        ConfigError: records are wanted of an empty source.
    """
    numbers: list[NDArray[np.int64]] = []
    places: list[NDArray[np.float64]] = []
    first = 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count and not size:
            raise ConfigError(f"{count} records are wanted of source {source + 1}, it has none")
        epochs = range(-(-count // size) if size else 0)
        keys = [(seed, source, epoch) if shuffle else None for epoch in epochs]
        rounds = [_permutation(size, key) for key in keys]
        numbers += [first + np.concatenate(rounds)[:count]] if rounds else []
        # 53 bits: every float64 of them is exact.
        jitter = (_bits(count, (seed, source)) >> np.uint64(11)) * 2.0**-53 if shuffle else 0.5
        places.append((np.arange(count) + jitter) / max(count, 1))
        first += size
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(numbers)[order] if numbers else np.empty(0, np.int64)


def _permutation(size: int, key: tuple[int, ...] | None) -> NDArray[np.int64]:
    if key is None:
        return np.arange(size, dtype=np.int64)
    return np.argsort(_bits(size, key), kind="stable").astype(np.int64)


def _bits(number: int, key: tuple[int, ...]) -> Bits:
    """Random 64-bit numbers: SplitMix64 from a hash of the key (Steele et al. 2014)."""
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.uint64(start) + np.arange(1, number + 1, dtype=np.uint64) * _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
