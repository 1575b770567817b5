"""OK-VQA (training): questions that need outside knowledge."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data_recipes.recipe import SHORT, Pictures, Recipe, Source, dialogue, load
from vlm.messages import Record

_HOST = "https://okvqa.allenai.org/static/data/"
_QUESTIONS = "OpenEnded_mscoco_train2014_questions.json.zip"
_ANSWERS = "mscoco_train2014_annotations.json.zip"
_COCO = Source("train2014.zip", "http://images.cocodataset.org/zips/train2014.zip")


def records(folder: Path) -> Iterator[Record]:
    """The questions in the file's order, each with its most common answer."""
    raw = load(folder, _ANSWERS, "mscoco_train2014_annotations.json")
    answers = {
        e["question_id"]: Counter(a["answer"] for a in e["answers"]).most_common(1)[0][0]
        for e in raw["annotations"]
    }
    asked = load(folder, _QUESTIONS, "OpenEnded_mscoco_train2014_questions.json")
    for entry in asked["questions"]:
        image = f"COCO_train2014_{entry['image_id']:012d}.jpg"
        turns = [(entry["question"] + SHORT, answers[entry["question_id"]])]
        yield dialogue(str(entry["question_id"]), image, turns, "okvqa")


RECIPE = Recipe(
    about="9K questions that need outside knowledge",
    license="see the publisher's page",
    size="unknown",
    count=9_009,
    sources=(Source(_QUESTIONS, _HOST + _QUESTIONS), Source(_ANSWERS, _HOST + _ANSWERS)),
    pictures=(Pictures("", _COCO, "train2014/"),),
    records=records,
)
