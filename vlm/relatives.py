"""Open the other vision-language models of transformers behind the same `Assistant`.

Whatever `AutoModelForImageTextToText` knows, besides the LLaVA folders that `vlm.checkpoint`
opens: LLaVA-NeXT, LLaVA-OneVision, BLIP-2, InstructBLIP, IDEFICS, SmolVLM, PaliGemma,
Qwen2-VL and so on. They answer by their own `generate` (`vlm.engine.generate`); nothing here
trains or writes them.
"""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from vlm.errors import (
    CheckpointError,
    ContextLengthError,
    ImageError,
    MessageError,
    MissingExtraError,
    VlmError,
)
from vlm.folder import one_line, part_config, read_json
from vlm.messages import user
from vlm.parts import check_keys
from vlm.prompts import PLAIN
from vlm.relative_processor import RelativeProcessor
from vlm.weights import shard_paths

# Families that the tests open; any other with a chat template is opened in the same way.
TESTED = (
    "blip-2",
    "idefics",
    "idefics3",
    "instructblip",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "qwen2_vl",
    "smolvlm",
)
# Packages that some family needs and we do not install, by the name that pip knows.
_EXTRAS = ("torchvision", "timm", "sentencepiece", "tiktoken", "num2words")
_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)


def load_relative(
    folder: Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, RelativeProcessor]:
    """Open any image-text-to-text model of transformers, strictly, in evaluation mode.

    Args:
        folder: with config.json, safetensors weights, tokenizer and processor files.
        device: where the weights go.
        dtype: of the weights; by default the checkpoint's own.

    Raises:
        CheckpointError: anything in the folder is missing, contradictory, unsafe or of a
            kind that is not known.
        MissingExtraError: the family needs a package that is not installed.
    """
    kind = read_json(folder, "config.json").get("model_type")
    if str(kind) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise CheckpointError(
            f"{folder}: unknown model_type {kind!r}; known: llava and what transformers opens as "
            f"image-text-to-text, such as {', '.join(TESTED)}. Join separate parts with "
            "`vlm compose`"
        )
    _refuse_unsafe(folder)
    shard_paths(folder)
    config = part_config(folder)
    with _quiet():
        standard, template = _open_processor(folder, config)
        model = _open_model(folder, config, dtype)
    model.to(device).eval().requires_grad_(False)
    processor = RelativeProcessor(standard, config, model.generation_config, template)
    try:
        processor.encode([user("What is this?", Image.new("RGB", (64, 64)))])
    except (CheckpointError, ContextLengthError, ImageError, MessageError) as error:
        reason = one_line(error.__cause__ or error)
        raise CheckpointError(
            f"{folder}: cannot be asked about a picture: {reason}; correct its chat template or "
            "processor_config.json"
        ) from error
    return model, processor


def _refuse_unsafe(folder: Path) -> None:
    if "quantization_config" in read_json(folder, "config.json"):
        raise CheckpointError(
            f"{folder}: the weights are quantised; use the folder of the original weights"
        )
    for path in (*folder.glob("*_config.json"), *folder.glob("*_tokenizer/*_config.json")):
        read_json(path.parent, path.name)


def _open_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The folder's weights, with nothing missing and nothing left over."""
    config._attn_implementation = None  # a folder may name one, even one to be downloaded
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except _ERRORS as error:
        raise _explain(folder, error) from error
    way_out = "; config.json and weights are not of one model, download both again"
    check_keys(folder, info, way_out=way_out)
    return model


class _WithoutVideo:
    """Lets a processor do without its video part, which needs torchvision and is never used."""

    def check_argument_for_proper_class(self, name: str, argument: object) -> Any:
        """As in transformers, but None passes for the video part."""
        if argument is None and "video" in name:
            return type(None)
        parent: Any = super()
        return parent.check_argument_for_proper_class(name, argument)


def _open_processor(folder: Path, config: PretrainedConfig) -> tuple[Any, str | None]:
    """The processor of the config's family with PIL backends, and the folder's template.

    Not AutoProcessor: it may choose the torchvision backend, insists on the video part, and
    takes the class that the folder names.
    """
    settings: dict[str, Any] = {}
    if (folder / "processor_config.json").is_file():
        settings = read_json(folder, "processor_config.json")
    template = _template(folder, settings)
    if template is None and config.model_type not in PLAIN:
        raise CheckpointError(
            f"{folder}: no chat_template.jinja, and {config.model_type} is not among what is asked "
            f"without one ({', '.join(PLAIN)}); download it from the model's page"
        )
    if type(config) not in PROCESSOR_MAPPING:
        raise CheckpointError(f"{folder}: {config.model_type} has no processor in transformers")
    try:
        family: Any = PROCESSOR_MAPPING[type(config)]
        parts = [_part(folder, name) for name in family.get_attributes()]
        known: Any = type(family.__name__, (_WithoutVideo, family), {})
        return known.from_args_and_dict(parts, settings), template
    except _ERRORS as error:
        raise _explain(folder, error) from error


def _part(folder: Path, name: str) -> Any:
    """One part of a processor by its name among the processor's arguments."""
    safe = {"local_files_only": True, "trust_remote_code": False}
    if name == "video_processor":
        return None
    if name == "image_processor":
        _check_image_processor(folder)
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **safe)
    if name.endswith("tokenizer"):
        home = folder if name == "tokenizer" else folder / name
        _check_tokenizer(home)
        return AutoTokenizer.from_pretrained(home, **safe)
    raise CheckpointError(f"{folder}: its processor has a part that is not supported: {name}")


def _check_image_processor(folder: Path) -> None:
    """Trap: AutoImageProcessor opens whatever class of transformers the folder names."""
    absent = True
    for name in ("processor_config.json", "preprocessor_config.json"):
        raw = read_json(folder, name) if (folder / name).is_file() else {}
        raw = raw.get("image_processor", {} if name == "processor_config.json" else raw)
        absent = absent and not raw
        kind = raw.get("image_processor_type") or raw.get("feature_extractor_type")
        if kind and not re.fullmatch(r"\w+(ImageProcessor|FeatureExtractor)(Fast|Pil)?", str(kind)):
            raise CheckpointError(f"{folder / name}: {kind!r} is no image processor")
    if absent:
        raise CheckpointError(
            f"{folder}: no preprocessor_config.json, and processor_config.json holds no "
            "image_processor; is the download complete?"
        )


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    if any((folder / n).is_file() for n in ("tokenizer.model", "spiece.model")):
        if importlib.util.find_spec("sentencepiece") is None:
            raise _missing(folder, "sentencepiece")
    elif not any((folder / n).is_file() for n in ("vocab.json", "vocab.txt")):
        raise CheckpointError(f"{folder}: no tokenizer.json; is the download complete?")


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template, from the places where transformers looks for a processor's."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: chat_template.jinja: {one_line(error)}") from error
    named = settings.get("chat_template")
    if (folder / "chat_template.json").is_file():
        named = read_json(folder, "chat_template.json").get("chat_template")
    named = named.get("default") if isinstance(named, dict) else named
    return named if isinstance(named, str) else None


def _explain(folder: Path, error: BaseException) -> VlmError:
    """An error of transformers as one of ours, on one line."""
    for package in _EXTRAS:
        if package in str(error).lower() and importlib.util.find_spec(package) is None:
            return _missing(folder, package)
    if isinstance(error, VlmError):
        return error
    if isinstance(error, ImportError):
        return MissingExtraError(f"{folder}: {one_line(error)}")
    return CheckpointError(f"{folder}: {one_line(error) or type(error).__name__}")


def _missing(folder: Path, package: str) -> MissingExtraError:
    return MissingExtraError(f"{folder}: this model needs {package}; run: pip install {package}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' tables and bars: what matters of them is in our errors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
