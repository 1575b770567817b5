"""Questions with known answers: exact match, intervals, and the controls that keep it honest.

A score means little alone. Beside it stand the *majority* baseline (always give the
commonest reference answer of the kind) and two controls that hide the picture from the
model: another record's picture, and a plain grey one. A model that looks beats all three.
Importing this module imports no torch.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from PIL import Image

from vlm.errors import ConfigError, RecordError
from vlm.images import ImageSource
from vlm.messages import Record
from vlm.record_files import picture_name
from vlm.scoring import Question, Report, score

BLANK_SIZE = (224, 224)
BLANK_COLOUR = (128, 128, 128)
SHUFFLED, BLANK = "shuffled pictures", "blank picture"


class Answerer(Protocol):
    """What evaluation needs of `vlm.assistant.Assistant`."""

    @property
    def name(self) -> str:
        """A short name for the report."""

    def ask_many(
        self, pairs: Iterable[tuple[ImageSource, str]], batch_size: int = ...
    ) -> Iterable[str]:
        """Answers in the order of the pairs."""


def evaluate(
    assistant: Answerer,
    records: Iterable[Record],
    *,
    shuffle_pictures: bool = False,
    blind: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> Report:
    """Ask every question of every record on its own, with the record's picture.

    Args:
        assistant: answers greedily.
        records: each with one picture and ``meta["questions"]``, a list of
            ``{"question", "answer", "kind"}``; further keys are ignored.
        shuffle_pictures: control: each question goes with another record's picture.
        blind: control: each question goes with a plain grey picture.
        seed: of the shuffling.
        batch_size: questions that run together.

    Raises:
        RecordError: a record without exactly one picture, or with malformed questions;
            or no question at all.
        ConfigError: both controls at once, or fewer than two pictures to shuffle.
        ImageError: a picture cannot be used.
    """
    if shuffle_pictures and blind:
        raise ConfigError("shuffle_pictures and blind exclude each other; run one at a time")
    questions = [question for record in records for question in questions_of(record)]
    if not questions:
        raise RecordError("the records hold no questions; fill meta['questions'] in them")
    shown: Sequence[ImageSource] = [question.image for question in questions]
    control = None
    if shuffle_pictures:
        other = derange([question.image for question in questions], seed)
        shown, control = [other[question.image] for question in questions], SHUFFLED
    elif blind:
        blank = Image.new("RGB", BLANK_SIZE, BLANK_COLOUR)
        shown, control = [blank] * len(questions), BLANK
    pairs = zip(shown, (question.text for question in questions), strict=True)
    answers = list(assistant.ask_many(pairs, batch_size=batch_size))
    return score(questions, answers, model=assistant.name, control=control)


def questions_of(record: Record) -> Iterator[Question]:
    """The questions of one record.

    Raises:
        RecordError: not exactly one picture, or malformed questions.
    """
    if len(record.images) != 1:
        raise RecordError(
            f"record {record.id!r} has {len(record.images)} pictures; evaluation needs one"
        )
    listed = record.meta.get("questions", [])
    if not isinstance(listed, list):
        raise RecordError(f"record {record.id!r}: meta['questions'] must be a list")
    for number, raw in enumerate(listed, 1):
        known = raw if isinstance(raw, dict) else {}
        values = [known.get(key) for key in ("question", "answer", "kind")]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        if len(texts) != len(values):
            raise RecordError(
                f"record {record.id!r}, question {number}: needs the texts question, answer, kind"
            )
        yield Question(record.id, record.images[0], *texts)


def derange(pictures: Iterable[str | bytes], seed: int) -> dict[str | bytes, str | bytes]:
    """Give every distinct picture another one, each being given once.

    One cycle through all pictures in random order (Sattolo 1986, Information Processing
    Letters 22:315-317), so that none keeps its own.

    Raises:
        ConfigError: there are fewer than two.
    """
    distinct = sorted(set(pictures), key=picture_name)
    if len(distinct) < 2:
        raise ConfigError("shuffling needs records with at least two different pictures")
    cycle = distinct.copy()
    random.Random(seed).shuffle(cycle)
    return dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
