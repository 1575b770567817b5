"""In which type weights are trained, and in which they are written."""

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


def prepare_dtypes(model: nn.Module, precision: str) -> dict[str, torch.dtype]:
    """Weights in the types that training needs, in place.

    What is trained is float32: the steps of an optimiser are too small for half precision.
    What is frozen stays bfloat16 or float32 for autocast, which on a CPU takes no float16;
    without autocast all is float32.

    Args:
        model: with its stage applied.
        precision: of the run.

    Returns:
        The earlier type of every parameter that was changed, for `restore_dtypes`.
    """
    before: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype not in HALF:
            continue
        single = parameter.requires_grad or precision == "float32"
        wanted = torch.float32 if single else torch.bfloat16
        if parameter.dtype != wanted:
            before[name] = parameter.dtype
            parameter.data = parameter.data.to(wanted)
    return before


def is_rounded(model: nn.Module, before: dict[str, torch.dtype]) -> bool:
    """Whether frozen weights lost digits, so that they must be read again to be written."""
    named = model.named_parameters()
    return any(name in before and p.dtype == torch.bfloat16 for name, p in named)


def restore_dtypes(model: nn.Module, before: dict[str, torch.dtype]) -> None:
    """Weights in the types in which their model is stored, in place."""
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = parameter.data.to(before[name])
