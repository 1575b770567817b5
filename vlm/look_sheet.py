"""A contact sheet of where the model looked: the picture once for each word of an answer."""

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from vlm.as_seen import AsSeen
from vlm.errors import ConfigError
from vlm.images import ImageSource
from vlm.looking import Glance
from vlm.processor import Processor

_COLUMNS = 5
_SIDE = 2.2  # inches of one picture


def words_of(glances: Sequence[Glance]) -> list[Glance]:
    """Tokens joined to words: a word looks where its tokens do, on average.

    A token begins a word if it begins with a space or is the first one.
    """
    words: list[list[Glance]] = []
    for glance in glances:
        if not words or glance.piece[:1].isspace():
            words.append([])
        words[-1].append(glance)
    return [
        Glance(
            "".join(g.piece for g in word).strip(),
            tuple(np.mean([g.maps[i] for g in word], axis=0) for i in range(len(word[0].maps))),
        )
        for word in words
    ]


def overlay(picture: Image.Image, grid: np.ndarray) -> Image.Image:
    """A picture as the tower gets it, bright where a map (h, w) is high and dim elsewhere."""
    top = float(grid.max()) or 1.0
    heat = Image.fromarray((255 * grid / top).astype(np.uint8)).resize(
        picture.size, Image.Resampling.BICUBIC
    )
    red = Image.new("RGB", picture.size, (230, 30, 30))
    dim = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.45)
    return Image.composite(Image.blend(picture, red, 0.45), dim, heat)


def panels(
    processor: Processor, pictures: Sequence[ImageSource], glances: Sequence[Glance]
) -> Iterator[tuple[Image.Image, str]]:
    """Overlays with their words: first the whole answer, then word by word, for each picture.

    Args:
        processor: of the model.
        pictures: of the conversation, in order.
        glances: of `vlm.looking.look`.

    Raises:
        ImageError: a picture cannot be used.
    """
    seen = [AsSeen(processor).picture(picture) for picture in pictures]
    every = range(len(seen))
    mean = tuple(np.mean([g.maps[i] for g in glances], axis=0) for i in every)
    shown = [Glance("all words", mean), *words_of(glances)]
    for word in shown:
        printable = "".join(c for c in word.piece if c.isprintable())
        for i in every:
            yield overlay(seen[i], word.maps[i]), printable


def write_sheet(
    path: str | os.PathLike[str],
    processor: Processor,
    pictures: Sequence[ImageSource],
    glances: Sequence[Glance],
) -> None:
    """Write a sheet of `panels`.

    Args:
        path: of a .png, .jpg, .pdf or .svg.
        processor: as for `panels`.
        pictures: as for `panels`.
        glances: as for `panels`.

    Raises:
        ConfigError: the file cannot be written, or its ending is unknown.
        ImageError: a picture cannot be used.
    """
    from matplotlib.figure import Figure

    drawn = list(panels(processor, pictures, glances))
    rows, columns = math.ceil(len(drawn) / _COLUMNS), min(_COLUMNS, len(drawn))
    figure = Figure(figsize=(_SIDE * columns, (_SIDE + 0.3) * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flat
    for axis, (picture, word) in zip(axes, drawn, strict=False):
        axis.imshow(picture)
        axis.set_title(word, fontsize=10, parse_math=False)
    for axis in figure.axes:
        axis.set_axis_off()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error})") from error
