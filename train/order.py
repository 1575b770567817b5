"""In which order samples come: at random, with like ones side by side where asked for.

What is grouped is only who shares a batch; each sample still comes once an epoch. The order
depends on the seed, the epoch and the samples, and on nothing else.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from train.survey import Survey

_MEGA = 50  # batches that are sorted by length together
_WAITING = 64  # pictures that may be drawn before their turn, to fill a batch exactly


class GroupedSampler(Sampler[int]):
    """Sample numbers, like ones in the same batch.

    Args:
        survey: of the samples.
        group_by: ``length``, ``modality_length`` or ``picture``; see `train.settings`.
        batch_size: samples of one optimiser step for lengths, so that all ranks have as much
            to do; of one forward pass for pictures.
        seed: of the run.
    """

    def __init__(self, survey: Survey, group_by: str, batch_size: int, seed: int) -> None:
        self._survey, self._group_by = survey, group_by
        self._batch_size, self._seed = batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._survey.length)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self._seed, self._epoch))
        everything = np.arange(len(self))
        if self._group_by == "picture":
            order = self._by_picture(draw)
        elif self._group_by == "modality_length":
            shown = self._survey.picture != 0
            order = self._by_length([everything[shown], everything[~shown]], draw)
        else:
            order = self._by_length([everything], draw)
        yield from map(int, order)

    def _by_length(self, kinds: list[np.ndarray], draw: np.random.Generator) -> np.ndarray:
        """Batches of like lengths, each of one kind but for the remainders."""
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for kind in kinds:
            shuffled = draw.permutation(kind)
            for start in range(0, len(shuffled), _MEGA * self._batch_size):
                some = shuffled[start : start + _MEGA * self._batch_size]
                some = some[np.argsort(self._survey.length[some], kind="stable")]
                whole = len(some) // self._batch_size * self._batch_size
                batches += list(some[:whole].reshape(-1, self._batch_size))
                rest.append(some[whole:])
        mixed = [batches[i] for i in draw.permutation(len(batches))]
        return np.concatenate([*mixed, *rest])  # the incomplete one must come last

    def _by_picture(self, draw: np.random.Generator) -> np.ndarray:
        """Samples of one picture side by side, and in one batch where they fit."""
        units = deque(draw.permuted(unit) for unit in self._units(draw))
        batches: list[np.ndarray] = []
        room = self._batch_size
        while units:
            near = range(min(len(units), _WAITING))
            place = next((i for i in near if len(units[i]) <= room), 0)
            unit = units[place]
            del units[place]
            batches.append(unit)
            room = (room - len(unit)) % self._batch_size or self._batch_size
        return np.concatenate(batches)

    def _units(self, draw: np.random.Generator) -> list[np.ndarray]:
        """Samples by their first picture, in random order; those without one alone."""
        pictures = self._survey.picture.copy()
        alone = pictures == 0
        pictures[alone] = -np.arange(1, 1 + np.count_nonzero(alone))
        order = np.argsort(pictures, kind="stable")
        _, starts = np.unique(pictures[order], return_index=True)
        units = np.split(order, starts[1:])
        return [units[i] for i in draw.permutation(len(units))]
