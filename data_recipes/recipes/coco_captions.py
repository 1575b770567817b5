"""COCO Captions 2017: each caption of a training picture is a record."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.recipe import Pictures, Recipe, Source, dialogue, load
from vlm.messages import Record

_COCO = "http://images.cocodataset.org/"
_FILE = "annotations_trainval2017.zip"


def records(folder: Path) -> Iterator[Record]:
    """The captions in the file's order."""
    raw = load(folder, _FILE, "annotations/captions_train2017.json")
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
    sources=(Source(_FILE, _COCO + "annotations/" + _FILE),),
    pictures=(Pictures("", Source("train2017.zip", _COCO + "zips/train2017.zip"), "train2017/"),),
    records=records,
)
