"""Resizing of a crop: Pillow's own full resize is the oracle."""

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm import resizing
from vlm.resizing import Crop, resize_and_crop

BICUBIC = Image.Resampling.BICUBIC
FILTERS = [BICUBIC] * 4 + [each for each in Image.Resampling if each != BICUBIC]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    samples = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(samples)


def middle(size: tuple[int, int], target: int) -> tuple[tuple[int, int], Crop]:
    """Size with the shorter side `target`, and its middle square."""
    short, long = min(size), max(size)
    other = int(target * long / short)
    resized = (target, other) if size[0] <= size[1] else (other, target)
    left, top = ((side - target) // 2 for side in resized)
    return resized, (left, top, left + target, top + target)


def errors(
    picture: Image.Image, size: tuple[int, int], crop: Crop, resample: int, **options: Any
) -> np.ndarray:
    expected = np.asarray(picture.resize(size, resample).crop(crop)).astype(int)
    found = np.asarray(resize_and_crop(picture, size, crop, resample, **options)).astype(int)
    return np.abs(found - expected)


# Common shapes, whose boxes are exact, in every other one; then odd ones.
SHAPES = [(640, 480), (300, 200), (480, 640), (150, 100), (90, 120), (70, 560), (800, 600)]


@pytest.mark.parametrize("seed", range(120))
def test_it_is_the_full_resize_bit_for_bit_and_the_box_a_level_off(seed: int) -> None:
    lots = random.Random(seed)
    size = SHAPES[seed // 2 % 7] if seed % 2 else (lots.randint(8, 300), lots.randint(8, 300))
    resized, crop = middle(size, lots.choice([224, 112, 96, 28, 56]))
    picture, resample = noise(size, seed), FILTERS[seed % len(FILTERS)]
    assert errors(picture, resized, crop, resample).max() == 0
    assert errors(picture, resized, crop, resample, exact=False).max() <= 1


def test_crops_anywhere_and_of_both_sides_are_exact() -> None:
    lots = random.Random(3)
    for _ in range(60):
        size = lots.randint(20, 200), lots.randint(20, 200)
        resized = lots.randint(10, 150), lots.randint(10, 150)
        left, top = lots.randrange(resized[0]), lots.randrange(resized[1])
        crop = (left, top, lots.randint(left + 1, resized[0]), lots.randint(top + 1, resized[1]))
        assert errors(noise(size), resized, crop, BICUBIC).max() == 0


@pytest.mark.parametrize(
    ("size", "target", "is_boxed"),
    [
        ((640, 480), 336, True),  # 448 x 336, from 80 to 560
        ((6000, 4000), 224, True),  # 336 x 224, from 1000 to 5000
        ((4000, 6000), 336, True),
        ((1920, 1080), 224, False),  # 398 x 224, from 419.7
        ((640, 480), 224, False),  # 298 x 224, from 79.5
        ((500, 375), 224, False),
    ],
)
def test_the_box_is_taken_where_its_weights_are_the_same(
    size: tuple[int, int], target: int, is_boxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized, crop = middle(size, target)
    boxes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, *args: Any, **options: Any) -> Image.Image:
        boxes.append(options.get("box"))
        return resize(self, *args, **options)

    picture = noise(size)
    expected = np.asarray(picture.resize(resized, BICUBIC).crop(crop))
    monkeypatch.setattr(Image.Image, "resize", watched)
    assert np.array_equal(np.asarray(resize_and_crop(picture, resized, crop, BICUBIC)), expected)
    assert (boxes[0] is not None) == is_boxed
    boxes.clear()
    resize_and_crop(picture, resized, crop, BICUBIC, exact=False)
    assert len(boxes) == 1 and boxes[0] is not None
    left, top, right, bottom = boxes[0]
    across, down = size[0] / resized[0], size[1] / resized[1]
    assert (left, right) == pytest.approx((crop[0] * across, crop[2] * across))
    assert (top, bottom) == pytest.approx((crop[1] * down, crop[3] * down))


def test_a_box_on_the_edge_of_a_rounding_is_not_called_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With half a step of doubt no weight is sure."""
    assert resizing._box_is_exact(640, 448, 56, 392, BICUBIC)
    resizing._box_is_exact.cache_clear()
    monkeypatch.setattr(resizing, "_DOUBT", 0.5)
    assert not resizing._box_is_exact(640, 448, 56, 392, BICUBIC)
    assert resizing._box_is_exact(640, 448, 0, 448, BICUBIC)
    resizing._box_is_exact.cache_clear()


def test_pictures_that_grow_are_exact_in_any_case() -> None:
    resized, crop = middle((124, 73), 336)
    assert errors(noise((124, 73)), resized, crop, BICUBIC, exact=False).max() == 0
