"""What config.json of a folder says, checked before anything is built from it."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlavaConfig, PretrainedConfig

from vlm.errors import CheckpointError
from vlm.language import check_language_config
from vlm.projector import projector_type
from vlm.vision import feature_layers, num_visual_tokens

Folder = str | os.PathLike[str]
ADAPTER_CONFIG = "adapter_config.json"  # peft's name
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "projector.safetensors")  # peft's, and ours
# Keys that would make the loader run code of the folder, or choose internals for us.
_FORBIDDEN = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


def read_config(folder: Folder) -> LlavaConfig:
    """The checked config of a LLaVA folder.

    Raises:
        CheckpointError: absent, not JSON, not LLaVA, unsafe or contradictory.
    """
    folder = Path(folder)
    raw = read_json(folder, "config.json")
    if raw.get("model_type") != "llava":
        raise CheckpointError(
            f"{folder}: unknown model_type {raw.get('model_type')!r}; known: llava. "
            "Join separate parts with `vlm compose`"
        )
    if _is_original_layout(raw):
        raise CheckpointError(
            f"{folder}: the layout of the original LLaVA repository; convert it with "
            f"`vlm import {folder} --out DIR`"
        )
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{folder}: the weights are quantised; use the folder of the original weights"
        )
    try:
        config = LlavaConfig.from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json: {one_line(error)}") from error
    check_config(config)
    return config


def check_config(config: LlavaConfig) -> int:
    """Raise CheckpointError unless the parts fit; returns the visual tokens of a picture."""
    count = num_visual_tokens(config)
    feature_layers(config)
    projector_type(config)
    check_language_config(config.text_config)
    if not 0 <= config.image_token_index < config.text_config.vocab_size:
        raise CheckpointError(
            f"image_token_index {config.image_token_index} is outside the vocabulary of "
            f"{config.text_config.vocab_size}; the language model needs an image token"
        )
    return count


def part_config(folder: Path) -> PretrainedConfig:
    """The config of a tower or a decoder on its own.

    Raises:
        CheckpointError: absent, not JSON, unsafe, or unknown to transformers.
    """
    read_json(folder, "config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json: {one_line(error)}") from error


def is_llava(folder: Path) -> bool:
    """Whether the folder is a LLaVA folder in the standard layout."""
    raw = read_json(folder, "config.json")
    return raw.get("model_type") == "llava" and not _is_original_layout(raw)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and a projector, and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder, free of keys that choose code to run.

    Raises:
        CheckpointError: no folder, no file, not an object, or such a key.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    try:
        raw = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {name}; is the download complete?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder / name}: not a JSON object")
    for level in (raw, raw.get("text_config"), raw.get("vision_config")):
        for key in _FORBIDDEN:
            if isinstance(level, dict) and key in level:
                raise CheckpointError(
                    f"{folder / name}: {key} would let the folder choose code to run; refused. "
                    "Remove the key if the architecture is a standard one"
                )
        kernel = level.get("attn_implementation") if isinstance(level, dict) else None
        if isinstance(kernel, str) and "/" in kernel:  # a name of the hub: code to be fetched
            raise CheckpointError(
                f"{folder / name}: attn_implementation {kernel!r} would fetch code to run; "
                "refused. Remove the key"
            )
    return raw


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, cut to a readable length."""
    return " ".join(str(error).split())[:300]


def _is_original_layout(raw: dict[str, Any]) -> bool:
    return "mm_vision_tower" in raw
