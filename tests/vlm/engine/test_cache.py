"""The feature cache: its keys, its bound, and that it owns its memory."""

import threading

import torch

from vlm.engine.cache import FeatureCache, FeatureKey

ROW = torch.ones(4, 8)  # 128 bytes in float32
ROW_BYTES = 128


def key(sha256: str = "a", preprocessing: str = "p", weights: str = "w") -> FeatureKey:
    return FeatureKey(sha256, preprocessing, weights)


def test_each_part_of_the_key_counts() -> None:
    cache = FeatureCache()
    cache.put(key(), ROW)
    assert cache.get(key()) is not None
    for other in (key(sha256="b"), key(preprocessing="q"), key(weights="v")):
        assert cache.get(other) is None


def test_the_byte_bound_holds_for_ten_thousand_pictures() -> None:
    cache = FeatureCache(max_bytes=10 * ROW_BYTES + 5)
    for number in range(10_000):
        cache.put(key(str(number)), ROW)
        assert cache.nbytes <= 10 * ROW_BYTES
    assert len(cache) == 10
    assert cache.nbytes == 10 * ROW_BYTES


def test_the_longest_unused_entry_leaves_first() -> None:
    cache = FeatureCache(max_bytes=2 * ROW_BYTES)
    cache.put(key("a"), ROW)
    cache.put(key("b"), ROW)
    cache.get(key("a"))
    cache.put(key("c"), ROW)
    assert cache.get(key("a")) is not None
    assert cache.get(key("b")) is None


def test_an_entry_larger_than_the_bound_is_not_kept_and_evicts_nothing() -> None:
    cache = FeatureCache(max_bytes=ROW_BYTES)
    cache.put(key("a"), ROW)
    cache.put(key("b"), torch.ones(5, 8))
    assert cache.get(key("a")) is not None
    assert cache.get(key("b")) is None


def test_a_kept_row_does_not_hold_on_to_its_batch() -> None:
    cache = FeatureCache()
    batch = torch.ones(100, 4, 8)
    cache.put(key(), batch[3])
    kept = cache.get(key())
    assert kept is not None
    assert kept.untyped_storage().nbytes() == ROW_BYTES


def test_putting_twice_counts_once() -> None:
    cache = FeatureCache()
    cache.put(key(), ROW)
    cache.put(key(), ROW)
    assert cache.nbytes == ROW_BYTES
    cache.clear()
    assert cache.nbytes == 0 and len(cache) == 0


def test_threads_keep_the_count_right() -> None:
    cache = FeatureCache(max_bytes=20 * ROW_BYTES)

    def work(name: str) -> None:
        for number in range(500):
            cache.put(key(f"{name}{number}"), ROW)
            cache.get(key(f"{name}{number // 2}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.nbytes == len(cache) * ROW_BYTES <= 20 * ROW_BYTES
