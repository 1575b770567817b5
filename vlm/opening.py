"""Model and processor of a folder, of whichever kind it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.checkpoint import load_checkpoint
from vlm.device import resolve_device, resolve_dtype
from vlm.errors import ConfigError
from vlm.folder import is_adapter, read_json

if TYPE_CHECKING:
    from vlm.quantize import Bits


def open_parts(
    folder: Path, device: Any, dtype: Any, quantize: "Bits | None", compile: bool
) -> tuple[Any, Any]:
    """Model and processor; arguments and errors as of `vlm.assistant.load`."""
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    if is_adapter(folder) or read_json(folder, "config.json").get("model_type") == "llava":
        return load_checkpoint(folder, place, precision, quantize)
    for name, value in (("quantize", quantize), ("compile", compile or None)):
        if value is not None:
            raise ConfigError(f"{name}={value!r} is for LLaVA folders; load it without")
    from vlm.relatives import load_relative

    return load_relative(folder, place, precision)
