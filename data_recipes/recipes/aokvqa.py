"""A-OKVQA (training): questions of common sense and knowledge, with four choices."""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase

from data_recipes.annotations import stream
from data_recipes.recipe import LETTER, Pictures, Recipe, Source, dialogue
from data_recipes.sources import COCO_2017
from vlm.messages import Record

_FILE = "aokvqa_v1p0.tar.gz"
_HOST = "https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/"


def records(folder: Path) -> Iterator[Record]:
    """The questions in the file's order, with lettered choices as LLaVA-1.5 asks them."""
    for entry in stream(folder, _FILE, "aokvqa_v1p0_train.json"):
        choices = [f"{ascii_uppercase[i]}. {text}" for i, text in enumerate(entry["choices"])]
        question = "\n".join([entry["question"], *choices]) + LETTER
        turns = [(question, ascii_uppercase[entry["correct_choice_idx"]])]
        yield dialogue(entry["question_id"], f"{entry['image_id']:012d}.jpg", turns, "aokvqa")


RECIPE = Recipe(
    about="17K questions that need common sense and knowledge, multiple choice",
    license="see the publisher's page",
    size="unknown",
    count=17_056,
    sources=(Source(_FILE, _HOST + _FILE),),
    pictures=(Pictures("", COCO_2017, "train2017/"),),
    records=records,
)
