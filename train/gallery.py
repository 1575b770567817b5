"""What the model answers to a few questions as it learns: ``samples.jsonl`` of a run."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from train.jobs import Job
from train.probes import spread
from train.trial import evaluating
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.errors import VlmError
from vlm.ledger_rows import encode_row
from vlm.messages import Message, Record
from vlm.model import VisionLanguageModel

FILE = "samples.jsonl"  # in a run's output folder
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answered:
    """One question at one step.

    Attributes:
        step: optimiser steps that the model had taken.
        id: of the record.
        images: paths of the pictures.
        question: the first one of the record, without its pictures.
        expected: the record's answer.
        answer: the model's, greedy, of at most 64 tokens.
        error: why there is none.
    """

    step: int
    id: str
    images: tuple[str, ...]
    question: str
    expected: str
    answer: str
    error: str | None = None


class Gallery:
    """Asks the same questions again and again.

    Args:
        job: a stage with pictures.
        data: records to take the questions from.
        num: how many.
        path: of the file; the first rank writes it.
        writes: whether this rank does.
    """

    def __init__(
        self, job: Job, data: Dataset[Record], num: int, path: Path, *, writes: bool
    ) -> None:
        self._job, self._path, self._writes = job, path, writes
        chosen = spread(np.arange(len(data)), num)  # type: ignore[arg-type]
        self._records = [data[index] for index in chosen]
        self.answers: list[Answered] = []

    def begin(self, step: int) -> None:
        """Take over what an earlier part of the run wrote, up to the step that it goes on from."""
        if step and self._path.is_file():
            self.answers = [each for each in read_answers(self._path) if each.step <= step]
        self._write()

    def ask(self, step: int) -> None:
        """Answer all questions with the weights as they are; nothing of the model changes."""
        model, dialogues = self._job.model, self._job.dialogues
        assert dialogues is not None and isinstance(model, VisionLanguageModel)
        with evaluating(model):
            # A new one each time: what an engine remembers is that of the weights it has seen.
            engine = Engine(model, dialogues.processor)
            self.answers += [self._answer(engine, record, step) for record in self._records]
        self._write()

    def _answer(self, engine: Engine, record: Record, step: int) -> Answered:
        asked = _opening(record)
        answer, error = "", None
        try:
            prompt = engine.processor.encode(asked, add_generation_prompt=True)
            request = Request(prompt, Sampling(max_new_tokens=MAX_NEW_TOKENS))
            # One by one: for several, an engine would rearrange the weights for speed.
            (done,) = engine.generate([request])
            answer = engine.processor.decode(done.ids)
        except VlmError as failure:
            error = str(failure)
        images = tuple(str(image) for message in asked for image in message.images)
        expected = record.messages[len(asked)].text
        return Answered(step, record.id, images, asked[-1].text, expected, answer, error)

    def _write(self) -> None:
        if not self._writes:
            return
        aside = self._path.with_suffix(".tmp")
        aside.write_bytes(b"".join(encode_row(asdict(each)) for each in self.answers))
        os.replace(aside, self._path)


def read_answers(path: Path) -> list[Answered]:
    """The rows of a file that `Gallery` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Answered(**{**row, "images": tuple(row["images"])}) for row in rows]


def _opening(record: Record) -> Sequence[Message]:
    """System text and first question."""
    first = next(n for n, message in enumerate(record.messages) if message.role == "assistant")
    return record.messages[:first]
