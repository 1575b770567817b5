"""COCO Captions 2017: each caption of a training picture is a record."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import Pictures, Recipe, Source, dialogue
from data_recipes.sources import COCO_2017
from vlm.messages import Record

_HOST = "http://images.cocodataset.org/annotations/"
_FILE = "annotations_trainval2017.zip"


def records(folder: Path) -> Iterator[Record]:
    """The captions in the file's order."""
    raw = load(folder, _FILE, "captions_train2017.json")
    names = {image["id"]: image["file_name"] for image in raw["images"]}
    for entry in raw["annotations"]:
        turns = [
            ("Provide a one-sentence caption for the provided image.", entry["caption"].strip())
        ]
        yield dialogue(str(entry["id"]), names[entry["image_id"]], turns, "coco-captions")


RECIPE = Recipe(
    about="five captions for each of 118K photographs",
    license="CC BY 4.0 (annotations); Flickr terms (pictures)",
    size="unknown",
    count=591_753,
    sources=(Source(_FILE, _HOST + _FILE),),
    pictures=(Pictures("", COCO_2017, "train2017/"),),
    records=records,
)
