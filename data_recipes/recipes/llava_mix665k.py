"""The LLaVA-1.5 instruction mix, with its six folders of pictures."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import llava
from data_recipes.formats import Fault
from data_recipes.recipe import Recipe, Source
from data_recipes.sources import LLAVA_MIX
from vlm.messages import Record

_FILE = "llava_v1_5_mix665k.json"
_HUB = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/"


def records(folder: Path) -> Iterator[Record | Fault]:
    """The entries in the file's order; ids repeat in the file, so the index is put behind."""
    return llava(folder, _FILE, "llava-mix665k")


RECIPE = Recipe(
    about="665K instructions for the second stage of LLaVA-1.5",
    license="CC BY 4.0 and the terms of each source",
    size="1.03 GB of annotations; pictures unknown",
    count=665_298,
    sources=(Source(_FILE, _HUB + _FILE),),
    pictures=LLAVA_MIX,
    records=records,
)
