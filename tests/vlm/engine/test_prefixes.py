"""What two prompts share: token by token and picture by picture."""

import numpy as np
import torch

from vlm.engine.cache import FeatureKey
from vlm.engine.prefixes import Kept, PrefixStore, shared_length, token_keys

CAT, DOG = (FeatureKey(name, "prep", "weights") for name in ("cat", "dog"))
IMAGE = 3


def layers(length: int, fill: float = 0.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two layers of 1 head and width 2: 32 bytes a position."""
    return [(torch.full((1, length, 2), fill), torch.zeros(1, length, 2)) for _ in range(2)]


def keys(ids: list[int], *pictures: FeatureKey) -> np.ndarray:
    return token_keys(ids, IMAGE, pictures)


def test_texts_share_their_equal_beginning() -> None:
    assert shared_length(keys([1, 2, 4, 5]), keys([1, 2, 4, 6, 7])) == 3
    assert shared_length(keys([1, 2]), keys([1, 2, 4])) == 2
    assert shared_length(keys([]), keys([1])) == 0


def test_equal_places_of_different_pictures_are_different() -> None:
    ids = [1, IMAGE, IMAGE, 2]
    assert shared_length(keys(ids, CAT), keys(ids, CAT)) == 4
    assert shared_length(keys(ids, CAT), keys(ids, DOG)) == 1
    two = [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 5]
    assert shared_length(keys(two, CAT, DOG), keys(two, CAT, CAT)) == 4
    assert shared_length(keys(ids, CAT), keys(ids, CAT._replace(preprocessing="other"))) == 1
    assert shared_length(keys(ids, CAT), keys(ids, CAT._replace(weights="other"))) == 1


def test_no_text_token_equals_a_picture() -> None:
    numbers = keys([IMAGE] * 500, CAT)
    assert len(set(numbers.tolist())) == 500
    assert numbers.max() < 0


def test_the_longest_shared_beginning_is_found() -> None:
    store = PrefixStore()
    store.keep(keys([1, 2, 4]), layers(3, 1.0))
    store.keep(keys([1, 2, 5, 6]), layers(4, 2.0))
    length, found = store.match(keys([1, 2, 5, 7]))
    assert length == 3 and isinstance(found, Kept)
    assert found.layers[0][0].unique().tolist() == [2.0]
    assert store.match(keys([9]))[0] == 0 and store.match(keys([9]))[1] is None


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    store = PrefixStore()
    store.keep(keys([1, 2]), layers(2))
    store.keep(keys([1, 2, 4]), layers(3))
    assert len(store) == 1 and store.nbytes == 3 * 32
    store.keep(keys([1, 2, 4]), layers(3))
    assert len(store) == 1 and store.nbytes == 3 * 32


def test_the_least_recently_used_make_room() -> None:
    store = PrefixStore(max_bytes=7 * 32)
    for first in (1, 2, 4):
        store.keep(keys([first, 9]), layers(2))
    store.match(keys([1, 9]))
    store.keep(keys([5, 9, 9]), layers(3))
    assert store.nbytes == 7 * 32
    assert [store.match(keys([first]))[0] for first in (1, 2, 4, 5)] == [1, 0, 1, 1]
    store.keep(keys(list(range(10, 18))), layers(8))  # larger than the bound: not kept
    assert store.match(keys([10]))[0] == 0 and store.nbytes == 7 * 32
    store.clear()
    assert len(store) == 0 and store.nbytes == 0
