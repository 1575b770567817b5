"""LLaVA-Instruct-150K: dialogues, descriptions and reasoning about COCO pictures."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.recipe import Pictures, Recipe, Source, from_llava, load
from vlm.messages import Record

_FILE = "llava_instruct_150k.json"
_URL = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/" + _FILE
_COCO = Source("train2017.zip", "http://images.cocodataset.org/zips/train2017.zip")


def records(folder: Path) -> Iterator[Record]:
    """The entries in the file's order; ids repeat in the file, so the index is put behind."""
    for i, entry in enumerate(load(folder, _FILE)):
        yield from_llava(entry, f"{entry['id']}-{i}", "llava-instruct-150k")


RECIPE = Recipe(
    about="158K dialogues written by GPT-4 about COCO pictures",
    license="CC BY 4.0 and the terms of OpenAI",
    size="unknown",
    count=157_712,
    sources=(Source(_FILE, _URL),),
    pictures=(Pictures("", _COCO, "train2017/"),),
    records=records,
)
