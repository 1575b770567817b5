"""Where a model runs and in which number format."""

import torch

from vlm.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``"auto"`` takes CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: unknown, or not available on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f"device {str(device)!r} is not available here; use auto, or cpu"
        ) from error
    return place


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """The type of a name; ``"auto"`` is float32 on the CPU and None elsewhere.

    None stands for the checkpoint's own type.

    Raises:
        ConfigError: unknown.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise ConfigError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
