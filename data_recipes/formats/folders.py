"""A folder of pictures, each with its text in a file of the same name.

cats/a.jpg  cats/a.txt
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data_recipes.formats.faults import Fault, FaultError, Report
from data_recipes.formats.pictures import Pictures
from data_recipes.formats.row import Row, captioned
from data_recipes.formats.text_files import Found, text_lines
from vlm.captioning import walk
from vlm.errors import RecordError
from vlm.messages import Record

SIDECAR = "__sidecar__"


def folder_rows(folder: Path, pictures: Pictures, report: Report) -> Iterator[Found]:
    """A row a picture below the folder, sorted; one without text is reported.

    Raises:
        RecordError: there is no picture.
    """
    is_empty = True
    for path in walk(str(folder)):
        is_empty = False
        name = os.path.relpath(path, folder)
        stem = os.path.splitext(name)[0]
        if not os.path.isfile(folder / f"{stem}.txt"):
            report(Fault(path, "malformed", f"no text {stem}.txt beside the picture; write it"))
            continue
        try:
            sidecar = Path(str(pictures.bind(f"{stem}.txt")))
            text = "".join(line for _, line in text_lines(sidecar, report))
        except FaultError as error:
            report(Fault(path, error.code, str(error)))
            continue
        yield Found(path, {SIDECAR: name, "text": text, "id": stem})
    if is_empty:
        raise RecordError(f"{folder} holds no data file and no pictures; give another folder")


def from_sidecar(row: Row) -> Record:
    """One picture and its text."""
    return captioned(row, row.raw[SIDECAR], row.raw["text"], (SIDECAR, "text"), row.name())
