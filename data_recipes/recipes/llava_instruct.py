"""LLaVA-Instruct-150K: dialogues, descriptions and reasoning about COCO pictures."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import llava
from data_recipes.formats import Fault
from data_recipes.recipe import Pictures, Recipe, Source
from data_recipes.sources import COCO_2017
from vlm.messages import Record

_FILE = "llava_instruct_150k.json"
_URL = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/" + _FILE


def records(folder: Path) -> Iterator[Record | Fault]:
    """The entries in the file's order; ids repeat in the file, so the index is put behind."""
    return llava(folder, _FILE, "llava-instruct-150k")


RECIPE = Recipe(
    about="158K dialogues written by GPT-4 about COCO pictures",
    license="CC BY 4.0 and the terms of OpenAI",
    size="229 MB of annotations; pictures unknown",
    count=157_712,
    sources=(Source(_FILE, _URL),),
    pictures=(Pictures("", COCO_2017, "train2017/"),),
    records=records,
)
