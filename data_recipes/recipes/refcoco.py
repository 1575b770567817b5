"""RefCOCO, RefCOCO+ and RefCOCOg (training): find what a phrase refers to, and the reverse."""

import pickle
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_recipes.annotations import load, opened
from data_recipes.recipe import DESCRIBE, LOCATE, Pictures, Recipe, Source, dialogue, region
from data_recipes.sources import COCO_2014
from vlm.errors import RecordError
from vlm.messages import Record

_HOST = "https://bvisionweb1.cs.unc.edu/licheng/referit/data/"


class _Plain(pickle.Unpickler):
    """Lists, dicts, numbers and texts; anything else, which could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise RecordError(f"the pickle names {module}.{name}, and data has no reason to")


def records(name: str, split: str, folder: Path) -> Iterator[Record]:
    """One dialogue a picture: each of its objects by each of its phrases."""
    file = f"{name}.zip"
    with opened(folder, file, f"refs({split}).p") as data:
        # Python 2 wrote it
        refs = _Plain(data, encoding="utf-8", errors="replace").load()
    instances = load(folder, file, "instances.json")
    boxes = {each["id"]: each["bbox"] for each in instances["annotations"]}
    pictures = {each["id"]: each for each in instances["images"]}
    by_picture: dict[int, list[list[tuple[str, str]]]] = {}
    for ref in refs:
        if ref["split"] == "train":
            picture = pictures[ref["image_id"]]
            box = region(boxes[ref["ann_id"]], (picture["width"], picture["height"]))
            said = [(each["sent"], box) for each in ref["sentences"]]
            by_picture.setdefault(ref["image_id"], []).append(said)
    for key, objects in by_picture.items():
        pairs = [pair for several in zip_longest(*objects) for pair in several if pair]
        turns = [
            (LOCATE.format(phrase), box) if i % 2 == 0 else (DESCRIBE.format(box), phrase)
            for i, (phrase, box) in enumerate(pairs)
        ]
        yield dialogue(str(key), pictures[key]["file_name"], turns, name)


def _recipe(name: str, split: str, count: int, about: str) -> Recipe:
    return Recipe(
        about=about,
        license="Apache 2.0 (the publisher's repository)",
        size="unknown",
        count=count,
        sources=(Source(f"{name}.zip", f"{_HOST}{name}.zip"),),
        pictures=(Pictures("", COCO_2014, "train2014/"),),
        records=partial(records, name, split),
    )


REFCOCO = _recipe("refcoco", "unc", 16_994, "phrases for 42K objects of COCO pictures")
PLUS = _recipe("refcoco+", "unc", 16_992, "the same without words of place")
G = _recipe("refcocog", "umd", 21_899, "longer phrases for 42K objects of COCO pictures")
