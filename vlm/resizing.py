"""Resizing of which only a crop is kept, without computing what is thrown away.

Pillow resizes in two passes, rows then columns, with 8-bit samples between them, and can
start from a box inside the picture (``Resample.c``). The box's edges are 32-bit floats there.
Where they are so rounded, weights change in their last bits and about one sample in a thousand
by one level; where they are exact, nothing changes. W and H: the picture's width and height.
"""

import functools
from fractions import Fraction

import numpy as np
from PIL import Image

_SUPPORT = {  # how far each filter reaches, in samples of the smaller of the two pictures
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}
_ONE = 1 << 22  # Pillow's fixed-point weights of 8-bit samples
_DOUBT = 1e-6  # of one fixed-point step; double arithmetic errs by a hundredth of that

Crop = tuple[int, int, int, int]


def resize_and_crop(
    picture: Image.Image, size: tuple[int, int], crop: Crop, resample: int, *, exact: bool = True
) -> Image.Image:
    """``picture.resize(size, resample).crop(crop)``, faster.

    Args:
        picture: 8-bit RGB.
        size: width and height after resizing.
        crop: left, top, right and bottom inside `size`.
        resample: Pillow's filter.
        exact: the same samples bit for bit. Otherwise a few may differ by one level where
            the picture gets smaller, and no more of it is read than the crop needs.
    """
    if picture.size == size:
        return picture.crop(crop)
    if crop == (0, 0, *size):
        return picture.resize(size, resample)
    if resample not in _SUPPORT:  # nearest has no passes, and the box filter has jumps
        return picture.resize(size, resample).crop(crop)
    left, top, right, bottom = crop
    grows = picture.width < size[0] or picture.height < size[1]  # roundings would add up
    if (exact or grows) and not (
        _box_is_exact(picture.width, size[0], left, right, resample)
        and _box_is_exact(picture.height, size[1], top, bottom, resample)
    ):
        return _pass_by_pass(picture, size, crop, resample)
    across, down = (Fraction(a, b) for a, b in zip(picture.size, size, strict=True))
    box = tuple(map(float, (left * across, top * down, right * across, bottom * down)))
    return picture.resize((right - left, bottom - top), resample, box=box)  # type: ignore[arg-type]


def _pass_by_pass(
    picture: Image.Image, size: tuple[int, int], crop: Crop, resample: int
) -> Image.Image:
    """Each pass over its whole axis, as its weights must be, but only where it is needed."""
    left, top, right, bottom = crop
    height = picture.height
    scale = height / size[1]
    reach = _SUPPORT[Image.Resampling(resample)] * max(scale, 1.0) + 1
    first, last = max(int(top * scale - reach), 0), min(int(bottom * scale + reach) + 1, height)
    trimmed = (first, last) != (0, height)
    rows = picture.crop((0, first, picture.width, last)) if trimmed else picture
    narrow = rows.resize((size[0], rows.height), resample)
    if (left, right) != (0, size[0]):
        narrow = narrow.crop((left, 0, right, narrow.height))
    if trimmed:  # back to where they were; no kept row reads the others
        canvas = Image.new("RGB", (narrow.width, height))
        canvas.paste(narrow, (0, first))
        narrow = canvas
    return narrow.resize((right - left, size[1]), resample).crop((0, top, right - left, bottom))


@functools.lru_cache(maxsize=4096)
def _box_is_exact(length: int, resized: int, start: int, stop: int, resample: int) -> bool:
    """Whether a box gives an axis the fixed-point weights that the whole axis gives.

    Its edges and length must be 32-bit floats, and no weight may lie so near the middle of
    two steps that its rounding could hang on the order of the arithmetic.

    Args:
        length: of the axis, in samples.
        resized: the same after resizing.
        start: first sample kept.
        stop: the one after the last.
        resample: only bicubic weights are looked at.
    """
    if (start, stop) == (0, resized):
        return True
    edges = (Fraction(each * length, resized) for each in (start, stop, stop - start))
    if resample != Image.Resampling.BICUBIC or any(
        Fraction(float(np.float32(float(edge)))) != edge for edge in edges
    ):
        return False
    scale = length / resized
    shrink = max(scale, 1.0)
    middles = (np.arange(start, stop)[:, None] + 0.5) * scale
    taps = np.floor(middles - 2 * shrink) + np.arange(int(4 * shrink) + 3)
    weights = _bicubic((taps + 0.5 - middles) / shrink) * ((taps >= 0) & (taps < length))
    steps = np.abs(weights / weights.sum(1, keepdims=True)) * _ONE
    return bool((np.abs(steps % 1.0 - 0.5) > _DOUBT).all())


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with a = -0.5 (IEEE TASSP 29(6), 1981), as Pillow has it."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
