"""What a recipe of a public data set is: its sources, and how its files become records."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes.formats import Fault
from vlm.messages import Message, Record, assistant, user

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
DESCRIBE = "Please provide a short description for this region: {}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."


@dataclass(frozen=True)
class Source:
    """A file of the publisher; ``url`` is None where a person must fetch it by hand."""

    file: str
    url: str | None
    sha256: str | None = None
    page: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures whose names begin with ``prefix`` lie below ``inside`` in a zip or folder."""

    prefix: str
    source: Source
    inside: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows that have their pictures inside.

    Attributes:
        title: becomes the source of records that name none.
        files: how the files in a folder, or in the folder of a subset, are called.
        hub: a data set of the hub, whose rows are streamed; None if they come from files only.
    """

    title: str
    files: str
    hub: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One public data set.

    Attributes:
        about, license, size: for people.
        count: the publisher's number of records, if it gives one.
        sources: files of which records are made.
        pictures: where the records' pictures lie.
        records: the records by a folder with the sources, and what none can be made of. A
            picture is called as one of `pictures` has it.
        rows: instead of all of these.
    """

    about: str
    license: str
    size: str
    count: int | None
    sources: tuple[Source, ...] = ()
    pictures: tuple[Pictures, ...] = ()
    records: Callable[[Path], Iterator[Record | Fault]] | None = None
    rows: Rows | None = None


def dialogue(id: str, image: str, turns: Iterable[tuple[str, str]], source: str) -> Record:
    """A record of questions and answers about one picture, which stands first."""
    messages: list[Message] = []
    for question, answer in turns:
        first = (image,) if not messages else ()
        messages += [user(question, *first), assistant(answer)]
    return Record(id, (image,), tuple(messages), source)


def vqa(
    questions: Iterable[dict[str, Any]], answers: Mapping[Any, str], source: str
) -> Iterator[Record]:
    """Records of questions about COCO's train2014, in their order, by VQA's keys."""
    for entry in questions:
        image = f"COCO_train2014_{entry['image_id']:012d}.jpg"
        turns = [(entry["question"] + SHORT, answers[entry["question_id"]])]
        yield dialogue(str(entry["question_id"]), image, turns, source)


def commonest(answers: Iterable[str]) -> str:
    """The answer that most people gave."""
    return Counter(answers).most_common(1)[0][0]


def region(box: Sequence[float], size: tuple[int, int]) -> str:
    """A box as LLaVA-1.5 writes it: corners as shares of the picture padded to a square.

    As its data has them (github.com/haotian-liu/LLaVA/issues/606): the shorter side is padded
    at both ends, x and y are divided by the longer side, two decimals.

    >>> region((0, 0, 200, 100), (200, 100))
    '[0.0, 0.25, 1.0, 0.75]'

    Args:
        box: left, top, width and height, in pixels.
        size: width and height of the picture, in pixels.
    """
    side = max(size)
    left, top = (box[i] + (side - size[i]) // 2 for i in (0, 1))
    corners = (left, top, left + box[2], top + box[3])
    return str([round(min(max(value / side, 0.0), 1.0), 2) for value in corners])
