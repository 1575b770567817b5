"""Questions against an oracle that reads the scene by itself."""

import random
import re
from collections import Counter

import pytest

from data_recipes.scenes import make_scene
from data_recipes.scenes.grammar import a, full_caption, listed, plural, short_caption
from data_recipes.scenes.questions import KINDS, Question
from data_recipes.scenes.world import HELD_OUT, PLACES, Scene

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]


def asked(kind: str, num: int = 400) -> list[tuple[Scene, Question]]:
    made = []
    for index in range(num):
        scene, rng = make_scene(11, index)
        question = KINDS[kind](scene, rng)
        if question is not None:
            made.append((scene, question))
    assert made
    return made


def nouns(scene: Scene) -> list[str]:
    return [f"{o.colour} {o.name}" if o.colour else o.name for o in scene.objects]


def present(scene: Scene, noun: str) -> bool:
    return noun in nouns(scene) or noun in [o.name for o in scene.objects]


def place_of(scene: Scene, noun: str) -> str:
    (item,) = [o for o in scene.objects if noun in (o.name, f"{o.colour} {o.name}")]
    return PLACES[item.place]


def test_existence_is_told_truly_and_balanced() -> None:
    answers = []
    for scene, q in asked("exists"):
        noun = re.search(r"\ban? (.+?)(?: in the picture)?\?$", q.question).group(1)
        assert q.answer.startswith("yes" if present(scene, noun) else "no"), (scene, q)
        answers.append(q.reference)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6
    assert set(answers) == {"yes", "no"}


def test_counts_are_counted() -> None:
    for scene, q in asked("count"):
        assert q.answer == NUMBERS[len(scene.objects)]
    for scene, q in asked("count_of"):
        words = re.sub(r"^(how many|count the) | are.*$|[.?]$", "", q.question)
        right = next(n for n in range(7) if NUMBERS[n] == q.answer)
        own = [n for n in nouns(scene) if words in (plural(n), plural(n.split()[-1]))]
        assert len(own) == right, (nouns(scene), q)


def test_places_are_where_things_stand() -> None:
    for scene, q in asked("where"):
        noun, place = re.fullmatch(r"the (.+) is at the (.+)", q.answer).groups()
        assert noun in q.question and place_of(scene, noun) == place
    for scene, q in asked("what_is_at"):
        place, answer = re.fullmatch(r"at the (.+) is (.+)", q.answer).groups()
        there = [n for n, o in zip(nouns(scene), scene.objects, strict=True)
                 if PLACES[o.place] == place]  # fmt: skip
        assert place in q.question
        assert answer == (a(there[0]) if there else "nothing")


def test_relations_follow_rows_and_columns() -> None:
    verdicts = Counter()
    for scene, q in asked("relation", 1500):
        said = r"the (.+) is at the (.+), the (.+) is at the (.+): (yes|no)"
        parts = re.fullmatch(said, q.answer)
        first, where_first, second, where_second, verdict = parts.groups()
        assert place_of(scene, first) == where_first and place_of(scene, second) == where_second
        p, r = PLACES.index(where_first), PLACES.index(where_second)
        truth = {
            "left": p % 3 < r % 3,
            "right": p % 3 > r % 3,
            "above": p // 3 < r // 3,
            "below": p // 3 > r // 3,
        }[q.kind]
        assert verdict == q.reference == ("yes" if truth else "no")
        assert q.question.index(first) < q.question.rindex(second)
        verdicts[q.kind, verdict] += 1
    assert len(verdicts) == 8 and min(verdicts.values()) > 50


def test_comparisons_and_negations() -> None:
    for scene, q in asked("compare"):
        word, bound = re.match(r"are there (more|fewer) than (\w+)", q.question).groups()
        n, total = NUMBERS.index(bound), len(scene.objects)
        assert q.answer == ("yes" if (total > n if word == "more" else total < n) else "no")
    for scene, q in asked("negation"):
        noun = re.search(r"there is (?:no|an?) (.+)$", q.answer)
        if noun:
            assert q.answer.startswith("no" if present(scene, noun.group(1)) else "yes")
        else:
            assert not present(scene, q.answer.removeprefix("the "))
    for scene, q in asked("where_absent"):
        assert not present(scene, q.answer.removeprefix("there is no "))


def test_attributes_belong_to_their_object() -> None:
    for scene, q in asked("colour"):
        name, colour = re.fullmatch(r"the (\w+) is (\w+)", q.answer).groups()
        assert f"{colour} {name}" in nouns(scene)
    for scene, q in asked("shape"):
        assert any(o.name == q.answer.split()[-1] and o.colour for o in scene.objects)
    for scene, q in asked("name"):
        assert q.answer == a(nouns(scene)[0]) and len(scene.objects) == 1


def test_nothing_is_asked_about_a_combination_that_is_never_shown() -> None:
    reserved = [f"{colour} {name}" for colour, name in HELD_OUT]
    for kind in KINDS:
        for _, q in asked(kind, 300):
            text = f"{q.question} {q.answer}"
            assert not any(re.search(rf"\b{noun}", text) for noun in reserved), q


def test_captions_in_reading_order() -> None:
    scene, _ = make_scene(11, 2)
    assert full_caption(scene) == listed(
        [f"{a(n)} at the {PLACES[o.place]}"
         for n, o in zip(nouns(scene), scene.objects, strict=True)]
    )  # fmt: skip
    for index in range(200):
        scene, _ = make_scene(12, index)
        caption = short_caption(scene)
        for noun, times in Counter(nouns(scene)).items():
            assert (a(noun) if times == 1 else f"{NUMBERS[times]} {plural(noun)}") in caption


@pytest.mark.parametrize(
    ("noun", "many"),
    [("dog", "dogs"), ("fish", "fish"), ("bus", "buses"), ("butterfly", "butterflies"),
     ("monkey", "monkeys"), ("potato", "potatoes"), ("red cross", "red crosses"), ("deer", "deer"),
     ("peach", "peaches"), ("radio", "radios"), ("blue star", "blue stars")],
)  # fmt: skip
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_the_same_lots_ask_the_same() -> None:
    scene, _ = make_scene(1, 1)
    for maker in KINDS.values():
        assert maker(scene, random.Random(3)) == maker(scene, random.Random(3))
