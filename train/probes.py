"""Does the model look? The same questions with the right, a blank and another picture.

A language model that guesses well has a low loss and no need of eyes. What the picture is
worth is how much dearer the same answers become without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from train.jobs import Job
from train.survey import Samples
from train.trial import evaluating
from vlm.errors import RecordError
from vlm.evaluation import BLANK_COLOUR, BLANK_SIZE, derange
from vlm.messages import Record

_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Sight:
    """What the same answers cost with each kind of picture, in nats a supervised token.

    Attributes:
        right: with the record's own.
        blank: with a plain grey one.
        other: with another record's.
        low: the lower end of the 95 % interval of ``other - right``; see `interval`.
        high: its upper end.
    """

    right: float
    blank: float
    other: float
    low: float
    high: float

    def numbers(self) -> dict[str, float]:
        """Under the names of a run's history."""
        return {
            "probe_right": self.right,
            "probe_blank": self.blank,
            "probe_other": self.other,
            "probe_gain_low": self.low,
            "probe_gain_high": self.high,
        }


def verdict(numbers: Mapping[str, Any]) -> str:
    """`Sight.numbers` in one line: it looks if the whole interval is above zero."""
    gain = numbers["probe_other"] - numbers["probe_right"]
    low, high = numbers["probe_gain_low"], numbers["probe_gain_high"]
    looks = "it looks" if low > 0 else "it does not look yet"
    return f"{looks}: another picture costs {gain:+.3f} nats a token [{low:+.3f}, {high:+.3f}]"


def interval(gains: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of the gain a token, by a paired bootstrap over records.

    Percentiles of the ratio of sums over resampled records (Efron and Tibshirani 1993, An
    Introduction to the Bootstrap, chapter 13); the draws are the same every time.

    Args:
        gains: how much dearer each record's answers became, in nats.
        counts: its supervised tokens.
    """
    each, tokens = np.array(gains), np.array(counts)
    draws = np.random.default_rng(_SEED).integers(len(each), size=(_RESAMPLES, len(each)))
    found = each[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def spread(numbers: np.ndarray, most: int) -> list[int]:
    """At most so many of the numbers, from first to last at even distances."""
    if not len(numbers) or not most:
        return []
    places = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    return [int(number) for number in numbers[places]]


class Probes:
    """The records that are tried, always the same ones.

    Args:
        job: a stage with pictures.
        held_out: records that are not trained on.
        most: records, of as many different pictures.
    """

    def __init__(self, job: Job, held_out: Samples, most: int) -> None:
        self._job = job
        pictures, first = np.unique(held_out.survey.picture, return_index=True)
        chosen = spread(np.sort(first[pictures != 0]), most)
        self._records = self._usable([held_out[index] for index in chosen])
        shown = {image for record in self._records for image in record.images}
        self._other = derange(shown, _SEED) if len(shown) > 1 else {}

    def __len__(self) -> int:
        return len(self._records) if self._other else 0

    def _usable(self, records: Sequence[Record]) -> list[Record]:
        """Those whose pictures open; Trainer's evaluation tells of the others."""
        assert self._job.dialogues is not None
        usable = []
        for record in records:
            try:
                self._job.dialogues.collate.encode(record)
            except RecordError:
                continue
            usable.append(record)
        return usable

    def measure(self) -> Sight:
        """Try all records; nothing of the model changes. Ranks do this together."""
        assert len(self), "no probes"
        blank = Image.new("RGB", BLANK_SIZE, BLANK_COLOUR)
        costs: list[tuple[float, ...]] = []
        counts: list[int] = []
        with evaluating(self._job.model), torch.no_grad():
            for record in self._records:
                other = tuple(self._other[image] for image in record.images)
                plain = cast(tuple[str | bytes, ...], (blank,) * len(record.images))
                shown = (record.images, plain, other)
                found = [self._cost(replace(record, images=images)) for images in shown]
                costs.append(tuple(cost for cost, _ in found))
                counts.append(found[0][1])
        right, blind, wrong = np.array(costs).T
        total = sum(counts)
        low, high = interval((wrong - right).tolist(), counts)
        return Sight(
            float(right.sum()) / total,
            float(blind.sum()) / total,
            float(wrong.sum()) / total,
            low,
            high,
        )

    def _cost(self, record: Record) -> tuple[float, int]:
        """The sum of the surprise over a record's supervised tokens, in nats, and their number.

        Its messages name the pictures' places, and its images what is shown there.
        """
        assert self._job.dialogues is not None
        collate = self._job.dialogues.collate
        row = collate.encode(record)
        device = next(self._job.model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in collate.collate([row]).items()}
        with self._job.around(batch) as inputs:
            loss = self._job.model(**inputs, num_items_in_batch=1)[0]
        return float(loss), sum(row.loss_mask[1:])
