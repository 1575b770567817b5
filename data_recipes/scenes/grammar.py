"""How a scene is put into words: noun phrases, numbers, captions."""

import random
from collections.abc import Sequence

from data_recipes.scenes.world import PLACES, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def a(noun: str) -> str:
    """``"dog"`` -> ``"a dog"``, ``"orange star"`` -> ``"an orange star"``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a noun of this world: ``"fish"`` -> ``"fish"``, ``"bus"`` -> ``"buses"``."""
    if noun.endswith(("fish", "sheep", "deer", "squid", "broccoli", "bread", "popcorn", "fire")):
        return noun
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith(("potato", "tomato")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def at(place: int) -> str:
    """A place with its preposition: ``"at the top left"``."""
    return f"at the {PLACES[place]}"


def is_at(item: SceneObject) -> str:
    """Where a thing stands, as a clause: ``"the dog is at the top left"``."""
    return f"the {item.noun} is {at(item.place)}"


def listed(parts: Sequence[str]) -> str:
    """``["a dog", "a key", "an egg"]`` -> ``"a dog, a key and an egg"``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def short_caption(scene: Scene) -> str:
    """What is there, in reading order: ``"a dog and two red circles"``."""
    nouns: dict[str, int] = {}
    for item in scene.objects:
        nouns[item.noun] = nouns.get(item.noun, 0) + 1
    return listed([_some(noun, count) for noun, count in nouns.items()])


def full_caption(scene: Scene) -> str:
    """What is there and where, in reading order."""
    return listed([_placed(item) for item in scene.objects])


def described(scene: Scene, rng: random.Random) -> str:
    """The scene as a text that stands in for the picture, its objects in any order."""
    items = rng.sample(scene.objects, len(scene.objects))
    style = rng.randrange(3)
    if style == 0:
        return "scene: " + ", ".join(_placed(item) for item in items) + "."
    if style == 1:
        return "scene: " + ", ".join(f"{PLACES[item.place]} {item.noun}" for item in items) + "."
    return "scene: " + ", ".join(f"{item.noun} {PLACES[item.place]}" for item in items) + "."


def _placed(item: SceneObject) -> str:
    return f"{a(item.noun)} {at(item.place)}"


def _some(noun: str, count: int) -> str:
    return a(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"
