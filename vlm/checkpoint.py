"""Open, compose and write model folders. One format: the Hugging Face LLaVA folder."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from vlm.errors import CheckpointError
from vlm.language import check_language_config, load_tokenizer
from vlm.model import VisionLanguageModel
from vlm.pixels import load_image_processor
from vlm.processor import Processor
from vlm.projector import HIDDEN_ACT, PROJECTORS, projector_type
from vlm.vision import VISION_TOWERS, feature_layers, num_visual_tokens
from vlm.weights import read_model, shard_paths, write_model

Folder = str | os.PathLike[str]
# Keys that would make the loader run code of the folder, or choose internals for us.
_FORBIDDEN = ("auto_map", "_attn_implementation_internal", "trust_remote_code")
_CLIP_EXTRAS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def load_checkpoint(
    folder: Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Open a LLaVA folder, strictly, in evaluation mode.

    Args:
        folder: with config.json, safetensors weights, tokenizer and processor files.
        device: where the weights go.
        dtype: of the weights; by default the one that config.json names, else float32.

    Raises:
        CheckpointError: anything in the folder is missing, contradictory or unsafe.
    """
    folder = Path(folder)
    config = read_config(folder)
    processor = Processor.from_folder(folder)
    shard_paths(folder)
    # Layers draw weights that are overwritten below; the caller's random numbers stay as they were.
    with (
        torch.random.fork_rng(devices=[]),
        no_init_weights(),
        torch.device(device),
        _default_dtype(dtype or config.dtype),
    ):
        model = VisionLanguageModel(config)
    model.language_model.tie_weights()  # not done while initialisation is off
    read_model(model, folder)
    if (folder / "generation_config.json").is_file():
        model.language_model.generation_config = GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
    return model.eval(), processor


def save_checkpoint(model: VisionLanguageModel, processor: Processor, folder: Folder) -> None:
    """Write one standard folder that transformers, and `load_checkpoint`, open as it is.

    Raises:
        CheckpointError: an adapter is still attached, or the folder cannot be written.
    """
    write_model(model, Path(folder))
    processor.save(folder)


def compose(
    vision: Folder,
    language: Folder,
    projector: str = "mlp2x_gelu",
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    dtype: torch.dtype | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Join a vision tower and a language model with a new random projector.

    Args:
        vision: folder of a CLIP model or of its vision half alone, with its
            preprocessor_config.json; or a LLaVA folder, whose tower is taken.
        language: folder of a decoder-only language model with its tokenizer; or a LLaVA
            folder, whose decoder is taken.
        projector: a key of `PROJECTORS`.
        vision_feature_layer: which layer's states are the visual tokens.
        vision_feature_select_strategy: ``"default"`` drops the class token.
        dtype: of the weights; by default the language model's.

    Raises:
        CheckpointError: a part cannot be opened or the parts do not fit.
    """
    if projector not in PROJECTORS:
        raise CheckpointError(f"unknown projector {projector!r}; known: {', '.join(PROJECTORS)}")
    vision, language = Path(vision), Path(language)
    tokenizer = load_tokenizer(language)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        image_token = tokenizer.convert_tokens_to_ids("<image>")
    decoder = _language_part(language, dtype)
    if len(tokenizer) > decoder.get_input_embeddings().num_embeddings:
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tower = _vision_part(vision, decoder.dtype)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token,
        projector_hidden_act=HIDDEN_ACT[projector],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
        **({} if projector == "mlp2x_gelu" else {"projector_type": projector}),
    )
    config.image_seq_length = check_config(config)
    model = VisionLanguageModel(config, tower, decoder)
    model.multi_modal_projector.to(decoder.dtype)
    image_processor = load_image_processor(vision, config)
    processor = Processor(tokenizer, image_processor, config, decoder.generation_config)
    return model.eval(), processor


def read_config(folder: Folder) -> LlavaConfig:
    """The checked config of a LLaVA folder.

    Raises:
        CheckpointError: absent, not JSON, not LLaVA, unsafe or contradictory.
    """
    folder = Path(folder)
    raw = _read_json(folder, "config.json")
    if raw.get("model_type") != "llava":
        raise CheckpointError(
            f"{folder}: unknown model_type {raw.get('model_type')!r}; known: llava. "
            "Join separate parts with vlm.checkpoint.compose"
        )
    if "quantization_config" in raw:
        raise CheckpointError(
            f"{folder}: the weights are quantised; use the folder of the original weights"
        )
    try:
        config = LlavaConfig.from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json: {_one_line(error)}") from error
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
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
    return raw


def _part_config(folder: Path) -> PretrainedConfig:
    _read_json(folder, "config.json")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: config.json: {_one_line(error)}") from error


def _is_llava(folder: Path) -> bool:
    return _read_json(folder, "config.json").get("model_type") == "llava"


def _language_part(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The decoder of a folder of its own, or of a LLaVA folder."""
    if _is_llava(folder):
        return load_checkpoint(folder, dtype=dtype)[0].language_model
    config = _part_config(folder)
    check_language_config(config)
    return _load_part(AutoModelForCausalLM, folder, config, dtype or "auto")


def _vision_part(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The tower of a folder of its own, of a whole CLIP model, or of a LLaVA folder."""
    if _is_llava(folder):
        return load_checkpoint(folder, dtype=dtype)[0].vision_tower
    config = _part_config(folder)
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_TOWERS:
        raise CheckpointError(
            f"{folder}: unknown vision tower {config.model_type!r}; "
            f"known: {', '.join(VISION_TOWERS)}"
        )
    return _load_part(CLIPVisionModel, folder, config, dtype)


def _load_part(
    auto: Any, folder: Path, config: PretrainedConfig, dtype: torch.dtype | str
) -> PreTrainedModel:
    """A part's own weights by transformers, with nothing missing and nothing left over."""
    shard_paths(folder)
    try:
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {_one_line(error)}") from error
    unexpected = [k for k in info["unexpected_keys"] if not k.startswith(_CLIP_EXTRAS)]
    for kind, names in (
        ("missing", sorted(info["missing_keys"])),
        ("unexpected", sorted(unexpected)),
        ("mismatched", sorted(str(k) for k in info["mismatched_keys"])),
    ):
        if names:
            raise CheckpointError(f"{folder}: {len(names)} {kind} weights: {', '.join(names[:6])}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{folder}: {name} holds NaN; use another copy of the weights")
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Build modules in `dtype`; None keeps float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
