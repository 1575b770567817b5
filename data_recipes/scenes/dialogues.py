"""A scene as conversations: what a record of each task says about its picture."""

import random
from collections.abc import Callable
from typing import Any

from data_recipes.scenes.grammar import a, described
from data_recipes.scenes.questions import KINDS, Question, caption_full, caption_short
from data_recipes.scenes.world import ALL_NOUNS, PLACES, Scene

Turns = list[dict[str, Any]]

# How often each kind is asked in training: what needs a name and a place together most.
_WEIGHTS = {
    "name": 1.5,
    "colour": 1.0,
    "shape": 1.0,
    "count": 1.2,
    "count_of": 1.2,
    "exists": 2.0,
    "negation": 1.0,
    "what_is_at": 2.5,
    "where": 2.5,
    "where_absent": 0.5,
    "relation": 4.0,
    "compare": 0.8,
    "caption_short": 0.7,
    "caption_full": 1.0,
}
assert _WEIGHTS.keys() == KINDS.keys()


def ask(scene: Scene, rng: random.Random, num: int) -> list[Question]:
    """``num`` questions of kinds drawn by their training weight."""
    kinds, weights = tuple(_WEIGHTS), tuple(_WEIGHTS.values())
    asked: list[Question] = []
    while len(asked) < num:
        question = KINDS[rng.choices(kinds, weights)[0]](scene, rng)
        if question is not None:
            asked.append(question)
    return asked


def instruct(scene: Scene, rng: random.Random, num_turns: int) -> Turns:
    """Picture first, then ``num_turns`` questions with their answers."""
    return _turns([(q.question, q.answer) for q in ask(scene, rng, num_turns)], picture=True)


def align(scene: Scene, rng: random.Random, num_turns: int) -> Turns:
    """Picture and captions: what is there, and what is where, in a random order."""
    captions = [caption_short(scene, rng), caption_full(scene, rng)]
    rng.shuffle(captions)
    return _turns([(q.question, q.answer) for q in captions[:num_turns]], picture=True)


def phrases(scene: Scene, rng: random.Random, num_turns: int) -> Turns:
    """Picture and one assistant turn for each thing on it: the texts that belong to it."""
    nouns = sorted({item.noun for item in scene.objects})
    return _turns([("name one thing.", a(noun)) for noun in nouns], picture=True)


def language(scene: Scene, rng: random.Random, num_turns: int) -> Turns:
    """The scene in words in the place of the picture, then questions and answers."""
    return tell(scene, ask(scene, rng, num_turns), rng)


def tell(scene: Scene, asked: list[Question], rng: random.Random) -> Turns:
    """The scene in words, then these questions with their answers."""
    first, *rest = [(q.question, q.answer) for q in asked]
    return _turns([(f"{described(scene, rng)} {first[0]}", first[1]), *rest])


def pairs(scene: Scene, rng: random.Random, num_turns: int) -> Turns:
    """A list of pairs, to be said again in another order: plain looking up, with no scene.

    A small decoder learns to look things up from this within minutes, and from scenes in
    words alone hardly at all; so it comes first.
    """
    size = rng.randint(2, 8)
    keys = rng.sample(ALL_NOUNS, size)
    values = rng.sample(PLACES, size)
    if rng.random() < 0.5:
        values = [rng.choice(ALL_NOUNS) for _ in keys]
    elif rng.random() < 0.5:
        keys, values = list(values), list(keys)
    both = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
    listed = ", ".join(both)
    if rng.random() < 0.5:
        return _turns([(f"scene: {listed}. once more.", listed)])
    rng.shuffle(both)
    return _turns([(f"scene: {listed}. in another order.", ", ".join(both))])


TASKS: dict[str, Callable[[Scene, random.Random, int], Turns]] = {
    "instruct": instruct,
    "align": align,
    "phrases": phrases,
    "language": language,
    "pairs": pairs,
}
# These say everything in words; no picture is drawn for them.
WITHOUT_PICTURE = frozenset({"language", "pairs"})


def questions(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """One question of every kind that the scene admits, for evaluation."""
    made = [maker(scene, rng) for maker in KINDS.values()]
    return [
        {"question": q.question, "answer": q.reference, "kind": q.kind}
        for q in made
        if q is not None
    ]


def _turns(pairs: list[tuple[str, str]], *, picture: bool = False) -> Turns:
    turns: Turns = []
    for index, (question, answer) in enumerate(pairs):
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if picture and index == 0:
            content.insert(0, {"type": "image"})
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return turns
