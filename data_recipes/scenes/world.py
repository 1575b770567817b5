"""What can stand in a drawn scene, and where: objects, places and how a scene is drawn by lot.

A scene is a square picture divided into 3 x 3 places. Each object stands in a place
of its own, slightly off its middle, so that objects touch at most at their edges.
Coordinates are fractions of the picture's side: x to the right, y downwards.
"""

import random
from dataclasses import dataclass
from typing import Literal

from data_recipes.scenes.names import EMOJI, EMOJI_NAMES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (250, 140, 18),
    "yellow": (250, 218, 30),
    "green": (36, 160, 60),
    "blue": (36, 84, 214),
    "purple": (134, 50, 172),
    "pink": (250, 128, 190),
    "black": (24, 24, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
# Combinations that no training scene shows: they measure whether colour and shape were
# learnt apart from each other. A scene of the split "heldout" has at least one of them.
HELD_OUT = frozenset(
    {("purple", "star"), ("yellow", "heart"), ("green", "cross"), ("pink", "square")}
)

ALL_NOUNS = (*EMOJI_NAMES, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))

Split = Literal["train", "test", "heldout"]
Kind = Literal["emoji", "shape"]
Background = Literal["plain", "gradient", "noisy"]
BACKGROUNDS: tuple[Background, ...] = ("plain", "gradient", "noisy")

PLACES = (
    "top left",
    "top center",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
MAX_OBJECTS = 6


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn thing. ``place`` counts the nine places row by row from 0.

    ``size`` is the side of its box, ``dx`` and ``dy`` how far it stands from the middle of
    its place (fractions of the picture's side); ``angle`` is in degrees, anticlockwise.
    """

    kind: Kind
    name: str
    colour: str | None
    place: int
    size: float
    dx: float
    dy: float
    angle: int

    @property
    def noun(self) -> str:
        """How people call it: ``"dog"`` or ``"red circle"``."""
        return f"{self.colour} {self.name}" if self.colour else self.name

    @property
    def row(self) -> int:
        """Row of its place, 0 at the top."""
        return self.place // 3

    @property
    def column(self) -> int:
        """Column of its place, 0 at the left."""
        return self.place % 3


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is needed to draw a picture and to know what is on it."""

    objects: tuple[SceneObject, ...]
    background: Background
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise_seed: int

    def at(self, place: int) -> SceneObject | None:
        """The object in a place, or None."""
        return next((item for item in self.objects if item.place == place), None)

    def count(self, noun: str) -> int:
        """How many objects are called ``noun`` (``"dog"``, ``"circle"`` or ``"red circle"``)."""
        return sum(noun in (item.noun, item.name) for item in self.objects)


def draw_lots(
    rng: random.Random, *, num_objects: int, split: Split = "train", shapes: float = 0.4
) -> Scene:
    """A scene with ``num_objects`` (1 to 6) objects.

    Args:
        rng: source of every choice; the same state gives the same scene.
        num_objects: 1 to `MAX_OBJECTS`.
        split: ``"train"`` and ``"test"`` avoid `HELD_OUT`; ``"heldout"`` starts with one of them.
        shapes: share of coloured shapes among the objects, the rest are emoji.

    Raises:
        ValueError: ``num_objects`` out of range.
    """
    if not 1 <= num_objects <= MAX_OBJECTS:
        raise ValueError(f"num_objects is {num_objects}; a scene holds 1 to {MAX_OBJECTS} objects")
    places = sorted(rng.sample(range(9), num_objects))
    looks = [_draw_look(rng, shapes) for _ in places]
    if num_objects > 1 and rng.random() < 0.2:
        looks[1] = looks[0]  # twins, so that counting one kind is worth asking
        rng.shuffle(looks)
    if split == "heldout":  # last, so that no twin takes its place
        colour, shape = rng.choice(sorted(HELD_OUT))
        looks[0] = ("shape", shape, colour)
        rng.shuffle(looks)
    objects = tuple(_place(rng, look, place) for look, place in zip(looks, places, strict=True))
    base = _light_colour(rng)
    return Scene(
        objects=objects,
        background=rng.choice(BACKGROUNDS),
        colours=(base, _light_colour(rng)),
        noise_seed=rng.getrandbits(32),
    )


def _draw_look(rng: random.Random, shapes: float) -> tuple[Kind, str, str | None]:
    if rng.random() >= shapes:
        return "emoji", rng.choice(EMOJI)[1], None
    while True:
        colour, shape = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        if (colour, shape) not in HELD_OUT:
            return "shape", shape, colour


def _place(rng: random.Random, look: tuple[Kind, str, str | None], place: int) -> SceneObject:
    kind, name, colour = look
    return SceneObject(
        kind=kind,
        name=name,
        colour=colour,
        place=place,
        size=rng.choice((27, 29, 31, 33, 35)) / 96,
        dx=rng.uniform(-2.5, 2.5) / 96,
        dy=rng.uniform(-2.5, 2.5) / 96,
        angle=rng.choice((-15, -10, -5, 0, 5, 10, 15)),
    )


def _light_colour(rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (rng.randint(196, 255) for _ in range(3))
    return red, green, blue
