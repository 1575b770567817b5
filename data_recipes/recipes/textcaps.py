"""TextCaps (training): captions that read the text in the picture."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import Pictures, Recipe, Source, dialogue
from data_recipes.sources import TEXTVQA
from vlm.messages import Record

_HOST = "https://dl.fbaipublicfiles.com/textvqa/"
_FILE = "TextCaps_0.1_train.json"


def records(folder: Path) -> Iterator[Record]:
    """The entries in the file's order."""
    for entry in load(folder, _FILE)["data"]:
        turns = [("Provide a one-sentence caption for the provided image.", entry["caption_str"])]
        yield dialogue(str(entry["caption_id"]), f"{entry['image_id']}.jpg", turns, "textcaps")


RECIPE = Recipe(
    about="110K captions that read text",
    license="CC BY 4.0 (annotations)",
    size="unknown",
    count=109_765,
    sources=(Source(_FILE, _HOST + "data/textcaps/" + _FILE),),
    pictures=(Pictures("", TEXTVQA, "train_images/"),),
    records=records,
)
