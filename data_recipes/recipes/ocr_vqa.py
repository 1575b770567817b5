"""OCR-VQA (training): questions about book covers; one dialogue a cover."""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.annotations import load
from data_recipes.recipe import SHORT, Pictures, Recipe, Source, dialogue
from data_recipes.sources import OCR_VQA
from vlm.messages import Record

_PAGE = "https://ocr-vqa.github.io"
_TRAIN = 1


def records(folder: Path) -> Iterator[Record]:
    """The covers of the training split in the file's order."""
    for id, entry in load(folder, "dataset.json").items():
        if entry["split"] == _TRAIN:
            asked = [question + SHORT for question in entry["questions"]]
            turns = zip(asked, entry["answers"], strict=True)
            yield dialogue(id, f"{id}.jpg", turns, "ocr-vqa")


RECIPE = Recipe(
    about="dialogues about book covers",
    license="see the publisher's page",
    size="unknown",
    count=None,
    sources=(Source("dataset.json", None, page=_PAGE),),
    pictures=(Pictures("", OCR_VQA),),
    records=records,
)
