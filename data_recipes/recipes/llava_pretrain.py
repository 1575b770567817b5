"""LLaVA-Pretrain: captions for stage 1; the prompt is kept, the plain template drops it."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import llava
from data_recipes.formats import Fault
from data_recipes.recipe import Pictures, Recipe, Source
from vlm.messages import Record

_HUB = "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/"
_FILE = "blip_laion_cc_sbu_558k.json"


def records(folder: Path) -> Iterator[Record | Fault]:
    """The entries in the file's order."""
    return llava(folder, _FILE, "llava-pretrain", repeats=False)


RECIPE = Recipe(
    about="558K captions for the alignment stage of LLaVA-1.5",
    license="other: terms of CC-3M and BLIP",
    size="27.6 GB",
    count=558_128,
    sources=(Source(_FILE, _HUB + _FILE),),
    pictures=(Pictures("", Source("images.zip", _HUB + "images.zip")),),
    records=records,
)
