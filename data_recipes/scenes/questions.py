"""Questions about a scene, each with its answer and its kind.

Answers that join a name and a place say the one that was asked before the one that is
looked up ("the dog is at the top left"), and relations say both places before the verdict:
a small decoder reads one thing at a time, and the reader sees what the verdict rests on.
Every function takes a scene and a source of lots and gives a `Question`, or None when the
scene does not admit one of that kind. Yes/no questions toss a coin for the answer first,
so that both answers are equally frequent. ``KINDS`` names them all.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from data_recipes.scenes.grammar import NUMBERS, a, at, full_caption, is_at, plural, short_caption
from data_recipes.scenes.names import EMOJI_NAMES
from data_recipes.scenes.world import COLOURS, HELD_OUT, PLACES, SHAPES, Scene, SceneObject
from vlm.scoring import verdict

SHORT_CAPTION_PROMPTS = (
    "what do you see?",
    "describe the picture briefly.",
    "what is in the picture?",
    "name the things in the picture.",
)
FULL_CAPTION_PROMPTS = (
    "describe the picture.",
    "describe the picture in detail.",
    "what is where?",
    "where is everything?",
)


@dataclass(frozen=True)
class Question:
    """One question, its reference answer, and the kind that scores are grouped by."""

    kind: str
    question: str
    answer: str

    @property
    def reference(self) -> str:
        """What decides whether an answer is right: its yes or no, where it has one."""
        return verdict(self.answer) or self.answer


def name(scene: Scene, rng: random.Random) -> Question | None:
    """What the only object is called."""
    if len(scene.objects) != 1:
        return None
    asked = ("what is this?", "name the object.", "what is shown?", "which object is this?")
    item = scene.objects[0]
    return Question(f"name {item.kind}", rng.choice(asked), a(item.noun))


def colour(scene: Scene, rng: random.Random) -> Question | None:
    """The colour of a shape that stands there once."""
    item = _one_of(rng, [o for o in scene.objects if o.colour and scene.count(o.name) == 1])
    if item is None or item.colour is None:
        return None
    word = rng.choice(("colour", "color"))
    asked = (
        f"what {word} is the {item.name}?",
        f"which {word} does the {item.name} have?",
        f"what is the {word} of the {item.name}?",
    )
    return Question("colour", rng.choice(asked), f"the {item.name} is {item.colour}")


def shape(scene: Scene, rng: random.Random) -> Question | None:
    """The shape of the only coloured shape of its colour."""
    shapes = [o for o in scene.objects if o.kind == "shape"]
    item = _one_of(rng, [o for o in shapes if sum(o.colour == p.colour for p in shapes) == 1])
    if item is None:
        return None
    asked = [f"what shape is the {item.colour} one?", f"which shape is {item.colour}?"]
    if len(scene.objects) == 1:
        asked += ["what shape is this?", "which shape is shown?"]
    return Question("shape", rng.choice(asked), a(item.name))


def count(scene: Scene, rng: random.Random) -> Question:
    """How many objects there are."""
    asked = (
        "how many objects are there?",
        "how many things are in the picture?",
        "how many objects do you see?",
        "count the objects.",
    )
    return Question("count", rng.choice(asked), NUMBERS[len(scene.objects)])


def count_of(scene: Scene, rng: random.Random) -> Question:
    """How many objects of one name there are, among them none."""
    item = rng.choice(scene.objects)
    noun = rng.choice((item.noun, item.name)) if rng.random() < 0.7 else _absent(scene, rng)
    asked = (
        f"how many {plural(noun)} are there?",
        f"how many {plural(noun)} are in the picture?",
        f"count the {plural(noun)}.",
    )
    return Question("count of a kind", rng.choice(asked), NUMBERS[scene.count(noun)])


def exists(scene: Scene, rng: random.Random) -> Question:
    """Whether something is there."""
    present = rng.random() < 0.5
    noun = _present(scene, rng) if present else _absent(scene, rng)
    asked = (
        f"is there {a(noun)}?",
        f"is there {a(noun)} in the picture?",
        f"do you see {a(noun)}?",
        f"can you see {a(noun)}?",
    )
    answer = f"yes, there is {a(noun)}" if present else f"no, there is no {noun}"
    return Question("exists", rng.choice(asked), answer)


def negation(scene: Scene, rng: random.Random) -> Question:
    """Whether something is missing, or which of two things is."""
    absent, present = _absent(scene, rng), _present(scene, rng)
    if rng.random() < 0.5:
        pair = [absent, present]
        rng.shuffle(pair)
        asked = f"which is not in the picture, the {pair[0]} or the {pair[1]}?"
        return Question("negation", asked, f"the {absent}")
    missing = rng.random() < 0.5
    noun = absent if missing else present
    asked = rng.choice((f"is there no {noun}?", f"is it true that there is no {noun}?"))
    answer = f"yes, there is no {noun}" if missing else f"no, there is {a(noun)}"
    return Question("negation", asked, answer)


def what_is_at(scene: Scene, rng: random.Random) -> Question:
    """What stands in a place; now and then in an empty one."""
    empty = [place for place in range(9) if scene.at(place) is None]
    if rng.random() < 0.15:
        place, thing = rng.choice(empty), "nothing"
    else:
        item = rng.choice(scene.objects)
        place, thing = item.place, a(item.noun)
    asked = (
        f"what is {at(place)}?",
        f"what do you see {at(place)}?",
        f"which object is {at(place)}?",
        f"what is {PLACES[place]}?",
    )
    return Question("what is at", rng.choice(asked), f"{at(place)} is {thing}")


def where(scene: Scene, rng: random.Random) -> Question | None:
    """Where a thing stands that is there once."""
    item = _one_of(rng, _unique(scene))
    if item is None:
        return None
    asked = (
        f"where is the {item.noun}?",
        f"where do you see the {item.noun}?",
        f"in which place is the {item.noun}?",
    )
    return Question("where", rng.choice(asked), is_at(item))


def where_absent(scene: Scene, rng: random.Random) -> Question:
    """Where a thing is that is not there: the question itself is wrong."""
    noun = _absent(scene, rng)
    asked = rng.choice((f"where is the {noun}?", f"where do you see the {noun}?"))
    return Question("where, absent", asked, f"there is no {noun}")


def relation(scene: Scene, rng: random.Random) -> Question | None:
    """Whether one thing is left of, right of, above or below another."""
    side = rng.choice(("left", "right", "above", "below"))
    axis: Callable[[SceneObject], int] = (
        (lambda o: o.column) if side in ("left", "right") else (lambda o: o.row)
    )
    things = _unique(scene)
    pairs = [(p, q) for p in things for q in things if axis(p) < axis(q)]
    if not pairs:
        return None
    before, after = rng.choice(pairs)
    true = rng.random() < 0.5
    first, second = (before, after) if true == (side in ("left", "above")) else (after, before)
    words = {"left": "to the left of", "right": "to the right of"}.get(side, side)
    short = {"left": "left of", "right": "right of"}.get(side, side)
    asked = (
        f"is the {first.noun} {words} the {second.noun}?",
        f"is the {first.noun} {short} the {second.noun}?",
    )
    answer = f"{is_at(first)}, {is_at(second)}: {'yes' if true else 'no'}"
    return Question(side, rng.choice(asked), answer)


def compare(scene: Scene, rng: random.Random) -> Question:
    """Whether there are more, or fewer, objects than a number."""
    total = len(scene.objects)
    more, true = rng.random() < 0.5, rng.random() < 0.5
    if more == true:
        bound = rng.randint(max(total - 2, 0), total - 1)
    else:
        bound = rng.randint(total, total + 1)
    if not more:
        bound += 1  # "fewer than n" is false from n = total downwards, true from total + 1
    word = "more" if more else "fewer"
    true = total > bound if more else total < bound
    asked = f"are there {word} than {NUMBERS[min(bound, 6)]} objects?"
    return Question("compare", asked, "yes" if true else "no")


def caption_short(scene: Scene, rng: random.Random) -> Question:
    """A caption that says what is there."""
    return Question("caption", rng.choice(SHORT_CAPTION_PROMPTS), short_caption(scene))


def caption_full(scene: Scene, rng: random.Random) -> Question:
    """A caption that says what is there and where."""
    return Question("caption with places", rng.choice(FULL_CAPTION_PROMPTS), full_caption(scene))


Maker = Callable[[Scene, random.Random], Question | None]
KINDS: dict[str, Maker] = {
    "name": name,
    "colour": colour,
    "shape": shape,
    "count": count,
    "count_of": count_of,
    "exists": exists,
    "negation": negation,
    "what_is_at": what_is_at,
    "where": where,
    "where_absent": where_absent,
    "relation": relation,
    "compare": compare,
    "caption_short": caption_short,
    "caption_full": caption_full,
}


def _one_of(rng: random.Random, items: list[SceneObject]) -> SceneObject | None:
    return rng.choice(items) if items else None


def _unique(scene: Scene) -> list[SceneObject]:
    return [item for item in scene.objects if scene.count(item.noun) == 1]


def _present(scene: Scene, rng: random.Random) -> str:
    item = rng.choice(scene.objects)
    return item.noun if rng.random() < 0.8 else item.name


def _absent(scene: Scene, rng: random.Random) -> str:
    """Something that is not there; half of the time close to something that is.

    Never one of `HELD_OUT`: a name that is only ever absent would teach its own answer.
    """
    reserved = {f"{colour} {name}" for colour, name in HELD_OUT}
    shapes = [item for item in scene.objects if item.colour]
    while True:
        if shapes and rng.random() < 0.5:
            near = rng.choice(shapes)
            noun = rng.choice(
                (f"{near.colour} {rng.choice(SHAPES)}", f"{rng.choice(tuple(COLOURS))} {near.name}")
            )
        elif rng.random() < 0.6:
            noun = rng.choice(EMOJI_NAMES)
        elif rng.random() < 0.3:
            noun = rng.choice(SHAPES)
        else:
            noun = f"{rng.choice(tuple(COLOURS))} {rng.choice(SHAPES)}"
        if noun not in reserved and not scene.count(noun):
            return noun
