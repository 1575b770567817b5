"""Rows of ids to rectangles. Shapes: B rows, T positions."""

from collections.abc import Sequence

import torch

IGNORE_INDEX = -100  # a label that is not learnt


def pad_rows(
    ids: Sequence[list[int]],
    learnt: Sequence[list[bool]] | None,
    pad_id: int,
    side: str = "left",
) -> dict[str, torch.Tensor]:
    """A padded batch.

    Args:
        ids: of each row.
        learnt: flags of each row, True where a label is.
        pad_id: fills rows up.
        side: where, ``"left"`` or ``"right"``.

    Returns:
        input_ids and attention_mask (B, T), and labels (B, T) if `learnt` is given.
    """
    if side not in ("left", "right"):
        raise ValueError(f"unknown padding_side {side!r}; use left or right")
    width = max(map(len, ids), default=0)

    def rectangle(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
        gaps = [[fill] * (width - len(row)) for row in rows]
        pairs = list(zip(rows, gaps, strict=True))
        return torch.tensor([gap + row if side == "left" else row + gap for row, gap in pairs])

    batch = {
        "input_ids": rectangle(ids, pad_id),
        "attention_mask": rectangle([[1] * len(row) for row in ids], 0),
    }
    if learnt is not None:
        labels = [
            [number if flag else IGNORE_INDEX for number, flag in zip(*pair, strict=True)]
            for pair in zip(ids, learnt, strict=True)
        ]
        batch["labels"] = rectangle(labels, IGNORE_INDEX)
    return batch
