"""TextVQA (training): questions whose answer is written in the picture."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import SHORT, Pictures, Recipe, Source, commonest, dialogue
from data_recipes.sources import TEXTVQA
from vlm.messages import Record

_HOST = "https://dl.fbaipublicfiles.com/textvqa/"
_FILE = "TextVQA_0.5.1_train.json"


def records(folder: Path) -> Iterator[Record]:
    """The entries in the file's order."""
    for entry in load(folder, _FILE)["data"]:
        turns = [(entry["question"] + SHORT, commonest(entry["answers"]))]
        yield dialogue(str(entry["question_id"]), f"{entry['image_id']}.jpg", turns, "textvqa")


RECIPE = Recipe(
    about="35K questions about text in pictures",
    license="CC BY 4.0 (annotations)",
    size="unknown",
    count=34_602,
    sources=(Source(_FILE, _HOST + "data/" + _FILE),),
    pictures=(Pictures("", TEXTVQA, "train_images/"),),
    records=records,
)
