"""What config.json of the original LLaVA repository says, checked.

Its own keys start with ``mm_`` and lie among those of the language model; their meaning is in
``llava/model/llava_arch.py``, ``multimodal_projector/builder.py`` and ``mm_utils.py`` of
github.com/haotian-liu/LLaVA.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from vlm.errors import CheckpointError
from vlm.folder import is_llava, one_line, part_config, read_config, read_json
from vlm.language import check_language_config

# By the architecture, or in its absence by the model_type.
_DECODERS: dict[str, type[PretrainedConfig]] = {
    "LlavaLlamaForCausalLM": LlamaConfig,
    "LlavaMistralForCausalLM": MistralConfig,
    "LlavaQwenForCausalLM": Qwen2Config,
    "llava": LlamaConfig,
    "llava_llama": LlamaConfig,
    "llava_mistral": MistralConfig,
    "llava_qwen": Qwen2Config,
}
_PROJECTORS = ("linear", "mlp2x_gelu")
_FEATURES: dict[str, Literal["full"] | None] = {"patch": None, "cls_patch": "full"}
_RATIOS = (None, "square", "pad")
# Keys that switch on something that a standard folder has no place for.
_UNKNOWN = {
    "mm_use_im_start_end": "pictures between <im_start> and <im_end> tokens",
    "mm_resampler_type": "a resampler before the projector",
    "s2": "features of several picture sizes (S2)",
}
_OLD_KEYS = ("rope_theta", "rope_scaling", "torch_dtype")  # transformers 5 has other names
_NOT_THE_DECODER = ("architectures", "transformers_version")


@dataclass(frozen=True)
class Settings:
    """How a folder joins its vision tower to its language model.

    Attributes:
        projector: a key of `vlm.projector.PROJECTORS`.
        layer: whose states are the visual tokens.
        strategy: as in `vlm.checkpoint.compose`.
        pad: whether pictures are padded to a square before they are resized.
        tower: hub id or path of the vision tower, if the folder names one.
        width: of the tower's features, if the folder says so.
        max_length: tokens of the longest training row, if the folder says so.
    """

    projector: str
    layer: int
    strategy: Literal["full"] | None
    pad: bool
    tower: str | None
    width: int | None
    max_length: int | None


def read_settings(folder: Path) -> Settings:
    """The settings of a folder in the original layout.

    Raises:
        CheckpointError: it is in another layout, or needs what a standard folder has not.
    """
    raw = read_json(folder, "config.json")
    if not _is_original(raw):
        raise CheckpointError(
            f"{folder}: config.json has no mm_ keys, so this is not the original LLaVA "
            "repository's layout; a standard folder needs no conversion, parts are joined with "
            "`vlm compose`"
        )
    for key, what in _UNKNOWN.items():
        if raw.get(key):
            raise CheckpointError(
                f"{folder}: {key} is {raw[key]!r}: {what} cannot be written in a standard LLaVA "
                "folder; choose a model without"
            )
    ratio = raw.get("image_aspect_ratio")
    if ratio not in _RATIOS:
        raise CheckpointError(
            f"{folder}: image_aspect_ratio {ratio!r} is not LLaVA-1.5's (known: square, pad); "
            "tiles as of 'anyres' are LLaVA-NeXT's, whose converted folders are at "
            "huggingface.co/llava-hf, such as llava-hf/llava-v1.6-vicuna-7b-hf"
        )
    projector = raw.get("mm_projector_type", "linear")
    if projector not in _PROJECTORS:
        raise CheckpointError(
            f"{folder}: mm_projector_type {projector!r} has no place in a standard LLaVA folder, "
            f"whose projector has one or two layers; known: {', '.join(_PROJECTORS)}"
        )
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in list(_FEATURES):
        raise CheckpointError(
            f"{folder}: unknown mm_vision_select_feature {feature!r}; known: {', '.join(_FEATURES)}"
        )
    layer = _number(folder, raw, "mm_vision_select_layer")
    if layer is None:
        raise CheckpointError(
            f"{folder}: config.json has no mm_vision_select_layer; add the layer that the model "
            "was trained with, -2 in LLaVA-1.5"
        )
    tower = raw.get("mm_vision_tower", raw.get("vision_tower"))
    return Settings(
        projector=projector,
        layer=layer,
        strategy=_FEATURES[feature],
        pad=ratio == "pad",
        tower=tower if isinstance(tower, str) and tower else None,
        width=_number(folder, raw, "mm_hidden_size"),
        max_length=_number(folder, raw, "tokenizer_model_max_length"),
    )


def read_text_config(folder: Path) -> PretrainedConfig:
    """The decoder's config of a folder: in the original layout, a LLaVA folder's, or its own.

    Raises:
        CheckpointError: it cannot be read, its weights are quantised, or nothing is known
            of the architecture.
    """
    raw = read_json(folder, "config.json")
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{folder}: the weights are quantised; use the folder of the original weights"
        )
    if _is_original(raw):
        config = _decoder_config(folder, raw)
    else:
        config = read_config(folder).text_config if is_llava(folder) else part_config(folder)
    check_language_config(config)
    return config


def _decoder_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """The decoder's keys out of a config that has all of LLaVA's beside them."""
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else raw.get("model_type")
    if name not in list(_DECODERS):  # it may be of any type
        raise CheckpointError(
            f"{folder}: unknown architecture {name!r}; known: {', '.join(_DECODERS)}"
        )
    kind = _DECODERS[name]
    known = {field.name for field in fields(kind)}.difference(_NOT_THE_DECODER).union(_OLD_KEYS)
    try:
        return kind(**{key: value for key, value in raw.items() if key in known})
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json: {one_line(error)}") from error


def _is_original(raw: dict[str, Any]) -> bool:
    return any(key.startswith("mm_") for key in raw)


def _number(folder: Path, raw: dict[str, Any], key: str) -> int | None:
    value = raw.get(key)
    if value is None or type(value) is int:
        return value
    raise CheckpointError(f"{folder}: config.json: {key} is {value!r}, not a whole number")
