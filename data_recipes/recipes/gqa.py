"""GQA (balanced training questions): reasoning about scene graphs, short answers."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import SHORT, Pictures, Recipe, Source, dialogue
from data_recipes.sources import GQA
from vlm.messages import Record

_HOST = "https://downloads.cs.stanford.edu/nlp/data/gqa/"
_FILE = "questions1.2.zip"


def records(folder: Path) -> Iterator[Record]:
    """The questions in the file's order."""
    for id, entry in load(folder, _FILE, "train_balanced_questions.json").items():
        turns = [(entry["question"] + SHORT, entry["answer"])]
        yield dialogue(id, f"{entry['imageId']}.jpg", turns, "gqa")


RECIPE = Recipe(
    about="943K questions made from scene graphs",
    license="CC BY 4.0",
    size="1.4 GB of questions; pictures unknown",
    count=943_000,
    sources=(Source(_FILE, _HOST + _FILE),),
    pictures=(Pictures("", GQA, "images/"),),
    records=records,
)
