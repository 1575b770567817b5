"""A step whose numbers are no numbers ends the run before it touches the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm.errors import DivergenceError

_NAMED = 8


def check_finite(
    step: int, losses: Sequence[Tensor], norm: Tensor | float | None, names: Sequence[Sequence[str]]
) -> None:
    """Raise where a loss or the gradients' norm is NaN or infinite.

    Args:
        step: the optimiser step under way, counted from 1.
        losses: scalars, one a micro-batch of this rank.
        norm: of the gradients of all ranks; None where it is not known.
        names: the ids of each micro-batch's records.

    Raises:
        DivergenceError: naming the step and the records of the micro-batches at fault, or of
            all of this rank's if only the gradients are.
    """
    numbers = list(losses) if norm is None else [*losses, torch.as_tensor(norm)]
    joined = torch.stack([number.detach().float().to(losses[0].device) for number in numbers])
    finite = joined.isfinite().tolist()
    if all(finite):
        return
    guilty = [ids for ids, fine in zip(names, finite, strict=False) if not fine] or names
    what = "gradient norm" if all(finite[: len(losses)]) else "loss"
    value = joined[finite.index(False)].item()
    ids = [name for group in guilty for name in group]
    told = ", ".join(ids[:_NAMED]) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
    raise DivergenceError(
        f"step {step}: the {what} is {value} on the records {told or 'of an unnamed batch'}; "
        "the step was not taken and no checkpoint written; look at these records or lower "
        "learning_rate, the last checkpoint stands"
    )
