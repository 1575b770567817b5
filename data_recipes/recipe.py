"""What a recipe of a public data set is: its sources, and how its files become records."""

import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import RecordError
from vlm.messages import ImagePart, Message, Record, TextPart, assistant, user

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


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
class Recipe:
    """One public data set; ``count`` is the publisher's number of records, if it gives one."""

    about: str
    license: str
    size: str
    count: int | None
    sources: tuple[Source, ...]
    pictures: tuple[Pictures, ...]
    records: Callable[[Path], Iterator[Record]]


def load(folder: Path, file: str, member: str | None = None) -> Any:
    """The JSON of a file, or of a member of a zip file; it is held in memory whole.

    Raises:
        RecordError: the file is truncated, or is no JSON.
    """
    path = folder / file
    try:
        if member is None:
            return json.loads(path.read_text(encoding="utf-8"))
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(member))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path}: not the publisher's file ({error}); fetch it again") from error


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


def from_llava(entry: dict[str, Any], id: str, source: str, prefix: str = "") -> Record:
    """One entry of a LLaVA file; ``<image>`` may stand anywhere in a human turn."""
    image = prefix + entry["image"] if "image" in entry else None
    messages: list[Message] = []
    for turn in entry["conversations"]:
        if turn["from"] != "human":
            messages.append(assistant(turn["value"]))
            continue
        parts: list[TextPart | ImagePart] = []
        for i, text in enumerate(turn["value"].split("<image>") if image else [turn["value"]]):
            if i and image:
                parts.append(ImagePart(image))
            if text.strip("\n"):
                parts.append(TextPart(text.strip("\n") if image else text))
        messages.append(Message("user", tuple(parts)))
    images = tuple(str(source) for message in messages for source in message.images)
    return Record(id, images, tuple(messages), source)
