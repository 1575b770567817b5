"""Compose, train and use vision-language assistants; everything is a standard LLaVA folder.

    import vlm

    assistant = vlm.load()  # the built-in model; or a folder, or a hub id
    print(assistant.ask("scene.png", "how many objects are there?"))

Names are imported on first use (PEP 562), so that ``import vlm`` costs nothing and the
parts without tensors stay usable without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.assistant import Assistant, load
    from vlm.caption_job import caption_images
    from vlm.captioning import CaptionResult
    from vlm.checkpoint import compose
    from vlm.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DivergenceError,
        ErrorLimitError,
        GenerationError,
        ImageError,
        MessageError,
        MissingExtraError,
        QueueFullError,
        RecordError,
        VlmError,
    )
    from vlm.images import load_image
    from vlm.messages import Message, Record

__version__ = "0.1.0"

__all__ = [
    "Assistant",
    "CaptionResult",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DivergenceError",
    "ErrorLimitError",
    "GenerationError",
    "ImageError",
    "Message",
    "MessageError",
    "MissingExtraError",
    "QueueFullError",
    "Record",
    "RecordError",
    "VlmError",
    "__version__",
    "caption_images",
    "compose",
    "load",
    "load_image",
]

_HOMES = {
    "Assistant": "vlm.assistant",
    "CaptionResult": "vlm.captioning",
    "Message": "vlm.messages",
    "Record": "vlm.messages",
    "caption_images": "vlm.caption_job",
    "compose": "vlm.checkpoint",
    "load": "vlm.assistant",
    "load_image": "vlm.images",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name, "vlm.errors" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module 'vlm' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access skips this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
