"""OK-VQA (training): questions that need outside knowledge."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import Pictures, Recipe, Source, commonest, vqa
from data_recipes.sources import COCO_2014
from vlm.messages import Record

_HOST = "https://okvqa.allenai.org/static/data/"
_QUESTIONS = "OpenEnded_mscoco_train2014_questions.json.zip"
_ANSWERS = "mscoco_train2014_annotations.json.zip"


def records(folder: Path) -> Iterator[Record]:
    """The questions in the file's order, each with its most common answer."""
    raw = load(folder, _ANSWERS, "mscoco_train2014_annotations.json")
    answers = {
        e["question_id"]: commonest(a["answer"] for a in e["answers"]) for e in raw["annotations"]
    }
    asked = load(folder, _QUESTIONS, "OpenEnded_mscoco_train2014_questions.json")
    yield from vqa(asked["questions"], answers, "okvqa")


RECIPE = Recipe(
    about="9K questions that need outside knowledge",
    license="see the publisher's page",
    size="unknown",
    count=9_009,
    sources=(Source(_QUESTIONS, _HOST + _QUESTIONS), Source(_ANSWERS, _HOST + _ANSWERS)),
    pictures=(Pictures("", COCO_2014, "train2014/"),),
    records=records,
)
