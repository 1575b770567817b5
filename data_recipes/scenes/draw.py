"""A scene as a picture."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from data_recipes.scenes.sprites import emoji_sprite, turn_and_scale
from data_recipes.scenes.world import COLOURS, Scene, SceneObject

DEFAULT_SIDE = 96  # pixels
_SHAPE_SIDE = 144  # shapes are drawn large once, then scaled down, which smooths their edges


def draw_scene(scene: Scene, side: int = DEFAULT_SIDE) -> Image.Image:
    """Draw a scene as an RGB picture of ``side`` x ``side`` pixels."""
    picture = _background(scene, side)
    for item in scene.objects:
        size = round(item.size * side)
        sprite = _sprite(item, size)
        middle_x = (item.column + 0.5) / 3 + item.dx
        middle_y = (item.row + 0.5) / 3 + item.dy
        left, top = (round(middle * side - size / 2) for middle in (middle_x, middle_y))
        inside = (min(max(left, 0), side - size), min(max(top, 0), side - size))
        picture.paste(sprite, inside, sprite)
    return picture


def _sprite(item: SceneObject, size: int) -> Image.Image:
    if item.kind == "emoji":
        return emoji_sprite(item.name, size, item.angle)
    assert item.colour is not None
    return _shape_sprite(item.name, item.colour, size, item.angle)


@lru_cache(maxsize=16384)
def _shape_sprite(name: str, colour: str, size: int, angle: int) -> Image.Image:
    return turn_and_scale(_shape(name, COLOURS[colour]), size, angle)


def _shape(name: str, colour: tuple[int, int, int]) -> Image.Image:
    side = _SHAPE_SIDE
    # The colour fills the transparent part too: scaling must not mix in another one.
    picture = Image.new("RGBA", (side, side), (*colour, 0))
    draw = ImageDraw.Draw(picture)
    fill = (*colour, 255)
    if name == "circle":
        draw.ellipse((8, 8, side - 9, side - 9), fill=fill)
    elif name == "square":
        draw.rectangle((16, 16, side - 17, side - 17), fill=fill)
    else:
        draw.polygon([(x * side, y * side) for x, y in _OUTLINES[name]], fill=fill)
    return picture


def _star() -> list[tuple[float, float]]:
    return [
        (0.5 + radius * math.sin(math.pi * step / 5), 0.52 - radius * math.cos(math.pi * step / 5))
        for step, radius in enumerate([0.5, 0.2] * 5)
    ]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * step / 60 for step in range(60)]
    return [
        (
            0.5 + 0.029 * 16 * math.sin(t) ** 3,
            0.47
            - 0.029
            * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in steps
    ]


def _cross() -> list[tuple[float, float]]:
    near, far, low, high = 0.34, 0.66, 0.06, 0.94
    return [
        (near, low), (far, low), (far, near), (high, near), (high, far), (far, far),
        (far, high), (near, high), (near, far), (low, far), (low, near), (near, near),
    ]  # fmt: skip


_OUTLINES = {
    "triangle": [(0.5, 0.06), (0.96, 0.9), (0.04, 0.9)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}


def _background(scene: Scene, side: int) -> Image.Image:
    first, second = scene.colours
    if scene.background == "plain":
        return Image.new("RGB", (side, side), first)
    if scene.background == "gradient":
        ramp = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        if scene.noise_seed % 2:
            ramp = ramp.transpose(1, 0, 2)
        mixed = (1 - ramp) * np.array(first, np.float32) + ramp * np.array(second, np.float32)
        pixels = np.broadcast_to(mixed, (side, side, 3))
    else:
        noise = np.random.default_rng(scene.noise_seed).standard_normal((side, side, 1))
        pixels = np.array(first, np.float32) + 10 * noise.astype(np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
