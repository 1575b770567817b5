"""What the processes of one run tell each other outside of gradients."""

import os
from typing import Any

import torch


def is_first_rank() -> bool:
    """Whether this process writes the files of the run; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def highest(value: int, device: torch.device, world_size: int) -> int:
    """The greatest value of all ranks; every rank must call this at the same time."""
    if world_size == 1:
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def everybody(rows: list[Any], device: torch.device, world_size: int) -> list[Any]:
    """The rows of all ranks in the order of the ranks; seldom any, so that is asked first."""
    if world_size == 1 or not highest(len(rows), device, world_size):
        return rows
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
