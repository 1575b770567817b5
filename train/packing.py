"""Row records to one packed row: nothing is padded, and like beginnings become one.

Records that show the same pictures and ask about them in the same words up to some point
have the same keys and values up to there. Such a beginning is computed once, and each
record goes on from it as a branch (`train.attention.Tree`). Loss and gradients are those
of the records one by one, to rounding.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from train.attention import Tree
from vlm.engine.prefixes import shared_length
from vlm.padding import IGNORE_INDEX


@dataclass(frozen=True)
class Row:
    """A record as tokens.

    Attributes:
        input_ids: T ids, visual tokens in their places.
        loss_mask: T flags, True where something is learnt.
        pictures: what stands for each picture, in their order; equal ones look alike.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    pictures: tuple[Hashable, ...]


@dataclass
class PackedRow:
    """Tokens of a packed row, and how they attend.

    Attributes:
        input_ids: T ids.
        position_ids: T places, each counted from the first token of its own record.
        labels: T ids, -100 where nothing is learnt.
        pictures: in the order of their visual tokens.
        trees: beginning and branches of each group of records.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[Hashable] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)

    def add(self, row: Row, start: int, end: int) -> None:
        """Append tokens [start, end) of a record."""
        self.input_ids += row.input_ids[start:end]
        self.position_ids += range(start, end)
        learnt = row.loss_mask[start:end]
        # What stands before a piece's first token here is not what stands before it there.
        assert not learnt[0] or start == 0, "a branch begins with a token that is learnt"
        self.labels.append(IGNORE_INDEX)
        self.labels += [
            number if wanted else IGNORE_INDEX
            for number, wanted in zip(row.input_ids[start + 1 : end], learnt[1:], strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """input_ids, position_ids and labels (1, T), and trees, see `trees_of`."""
        width = max(len(tree.branches) for tree in self.trees)
        trees = torch.zeros(len(self.trees), 2 + width, dtype=torch.long)
        for place, tree in enumerate(self.trees):
            numbers = (tree.start, tree.shared, *tree.branches)
            trees[place, : len(numbers)] = torch.tensor(numbers)
        return {
            "input_ids": torch.tensor([self.input_ids]),
            "position_ids": torch.tensor([self.position_ids]),
            "labels": torch.tensor([self.labels]),
            "trees": trees,
        }


def pack(rows: Sequence[Row], image_token_id: int, *, share: bool) -> PackedRow:
    """One row of all records.

    Args:
        rows: of at least one token each.
        image_token_id: of visual tokens.
        share: compute like beginnings once; records that share one stand side by side.
    """
    packed = PackedRow()
    for group in _groups(rows) if share else ([row] for row in rows):
        start = len(packed.input_ids)
        shared = _shared_length(group, image_token_id)
        if not shared:
            for row in group:
                packed.trees.append(Tree(len(packed.input_ids), len(row.input_ids)))
                packed.add(row, 0, len(row.input_ids))
                packed.pictures += row.pictures
            continue
        packed.trees.append(Tree(start, shared, tuple(len(r.input_ids) - shared for r in group)))
        packed.add(group[0], 0, shared)
        seen = _num_runs(group[0].input_ids[:shared], image_token_id, group[0])
        packed.pictures += group[0].pictures[:seen]
        for row in group:
            packed.add(row, shared, len(row.input_ids))
            packed.pictures += row.pictures[seen:]
    return packed


def trees_of(trees: Tensor) -> list[Tree]:
    """The trees of a batch: a line each of start, shared length and the branches' lengths."""
    lines = trees.tolist()
    return [Tree(start, shared, tuple(filter(None, rest))) for start, shared, *rest in lines]


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that show the same pictures, in the order of their first; others alone."""
    groups: dict[Hashable, list[Row]] = {}
    for number, row in enumerate(rows):
        key = row.pictures or number
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def _shared_length(group: Sequence[Row], image_token_id: int) -> int:
    """How many tokens all rows begin with, a picture among them; 0 if it is not worth it."""
    if len(group) < 2:
        return 0
    first = group[0].input_ids
    shared = min(shared_length(np.array(first), np.array(row.input_ids)) for row in group[1:])
    # A token that is learnt is predicted from the one before it, which must be a branch's own.
    shared = min(shared, *(row.loss_mask.index(True) - 1 for row in group))
    while shared > 0 and first[shared - 1] == first[shared] == image_token_id:
        shared -= 1  # never in the middle of a picture
    return shared if image_token_id in first[: max(shared, 0)] else 0


def _num_runs(ids: Sequence[int], image_token_id: int, row: Row) -> int:
    """How many of the row's pictures lie in the first tokens, which cut none in two."""
    size = row.input_ids.count(image_token_id) // len(row.pictures)
    return list(ids).count(image_token_id) // size
