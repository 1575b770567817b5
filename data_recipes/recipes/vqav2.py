"""VQAv2 (training): short answers about COCO pictures."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import Pictures, Recipe, Source, vqa
from data_recipes.sources import COCO_2014
from vlm.messages import Record

_HOST = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/"
_QUESTIONS = "v2_Questions_Train_mscoco.zip"
_ANSWERS = "v2_Annotations_Train_mscoco.zip"


def records(folder: Path) -> Iterator[Record]:
    """The questions in the file's order, each with its most common answer."""
    raw = load(folder, _ANSWERS, "v2_mscoco_train2014_annotations.json")
    answers = {e["question_id"]: e["multiple_choice_answer"] for e in raw["annotations"]}
    asked = load(folder, _QUESTIONS, "v2_OpenEnded_mscoco_train2014_questions.json")
    yield from vqa(asked["questions"], answers, "vqav2")


RECIPE = Recipe(
    about="444K questions about COCO pictures",
    license="CC BY 4.0 (annotations); Flickr terms (pictures)",
    size="unknown",
    count=443_757,
    sources=(Source(_QUESTIONS, _HOST + _QUESTIONS), Source(_ANSWERS, _HOST + _ANSWERS)),
    pictures=(Pictures("", COCO_2014, "train2014/"),),
    records=records,
)
