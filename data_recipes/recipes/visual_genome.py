"""Visual Genome: questions about pictures, and descriptions of regions."""

from collections.abc import Callable, Iterator
from pathlib import Path

from data_recipes.annotations import stream
from data_recipes.recipe import (
    DESCRIBE,
    LOCATE,
    SHORT,
    Pictures,
    Recipe,
    Source,
    dialogue,
    region,
)
from data_recipes.sources import VG, VG_2
from vlm.messages import Record

_HOST = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset/"
_MOST_TURNS = 10  # a picture has fifty regions


def questions(folder: Path) -> Iterator[Record]:
    """The questions in the file's order, at most ten a dialogue."""
    names = {key: name for key, name, _ in _pictures(folder)}
    for entry in stream(folder, "question_answers.json.zip", "question_answers.json"):
        turns = [(qa["question"] + SHORT, qa["answer"]) for qa in entry["qas"]]
        if turns:
            key = entry["qas"][0]["image_id"]
            yield from _dialogues(key, names[key], turns, "visual-genome-qa")


def regions(folder: Path) -> Iterator[Record]:
    """The regions in the file's order, described and located in turn, at most ten a dialogue."""
    pictures = {key: (name, size) for key, name, size in _pictures(folder)}
    for entry in stream(folder, "region_descriptions.json.zip", "region_descriptions.json"):
        turns = []
        for i, found in enumerate(entry["regions"]):
            name, size = pictures[found["image_id"]]
            box = region([found[side] for side in ("x", "y", "width", "height")], size)
            phrase = found["phrase"].strip()
            pair = (DESCRIBE.format(box), phrase) if i % 2 == 0 else (LOCATE.format(phrase), box)
            turns.append(pair)
        if turns:
            yield from _dialogues(found["image_id"], name, turns, "visual-genome-regions")


def _pictures(folder: Path) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """Id, the end of the address, width and height."""
    for entry in stream(folder, "image_data.json.zip", "image_data.json"):
        name = "/".join(entry["url"].split("/")[-2:])
        yield entry["image_id"], name, (entry["width"], entry["height"])


def _dialogues(key: int, image: str, turns: list[tuple[str, str]], source: str) -> Iterator[Record]:
    for i in range(0, len(turns), _MOST_TURNS):
        part = turns[i : i + _MOST_TURNS]
        yield dialogue(f"{key}-{i // _MOST_TURNS}", image, part, source)


def _recipe(about: str, file: str, records: Callable[[Path], Iterator[Record]]) -> Recipe:
    return Recipe(
        about=about,
        license="CC BY 4.0",
        size="unknown",
        count=None,
        sources=tuple(Source(name, _HOST + name) for name in ("image_data.json.zip", file)),
        pictures=(Pictures("VG_100K/", VG, "VG_100K/"), Pictures("VG_100K_2/", VG_2, "VG_100K_2/")),
        records=records,
    )


QA = _recipe("1.7M questions about 108K pictures", "question_answers.json.zip", questions)
REGIONS = _recipe(
    "5.4M regions of 108K pictures, described and located", "region_descriptions.json.zip", regions
)
