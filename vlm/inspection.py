"""What a model folder holds, how it would be prompted, and everything that is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from vlm.checkpoint import empty_model, load_checkpoint
from vlm.errors import CheckpointError
from vlm.folder import is_adapter, read_config
from vlm.manifest import read_manifest, verify
from vlm.messages import Message, assistant, user
from vlm.model import VisionLanguageModel
from vlm.pixels import load_image_processor
from vlm.portability import transformers_differences, vllm_differences
from vlm.processor import Processor
from vlm.weights import read_model, shard_paths

_PARTS = ("vision_tower", "multi_modal_projector", "language_model")


@dataclass(frozen=True)
class Part:
    """One part of a model.

    Attributes:
        name: its attribute in the model.
        kind: its class.
        num_parameters: shared ones counted once.
        dtype: of its weights; several are joined by a comma.
    """

    name: str
    kind: str
    num_parameters: int
    dtype: str


@dataclass(frozen=True)
class Piece:
    """A stretch of an encoded example.

    Attributes:
        text: as decoded; a picture is its token and how often it stands there.
        learnt: whether training computes a loss on it.
    """

    text: str
    learnt: bool


@dataclass
class Inspection:
    """What was found in a folder.

    Attributes:
        folder: where.
        state: ``"model"``, or ``"adapter"`` with a base model elsewhere.
        parts: of the model, if it opens.
        facts: further names and values.
        example: one question and answer about a picture, as training sees it.
        transformers: why plain transformers would answer differently.
        vllm: why vLLM would not open it.
        training: the runs that made it, as its ``vlm.json`` tells.
        problems: what keeps the folder from opening, one line each.
    """

    folder: Path
    state: str
    parts: list[Part] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    example: list[Piece] = field(default_factory=list)
    transformers: list[str] = field(default_factory=list)
    vllm: list[str] = field(default_factory=list)
    training: list[Mapping[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect_folder(folder: Path) -> Inspection:
    """Open a folder as strictly as ever, and go on after a problem to find the next one."""
    found = Inspection(folder, "adapter" if is_adapter(folder) else "model")
    try:
        model, processor = load_checkpoint(folder)
    except CheckpointError as error:
        found.problems = _problems(folder, str(error))
        return found
    found.parts = parts_of(model)
    found.facts = facts_of(model, processor)
    found.example = render_example(processor)
    found.transformers = transformers_differences(model)
    found.vllm = vllm_differences(model)
    found.training = list(model.history)
    if read_manifest(folder) is not None:
        found.problems = verify(folder)
    return found


def parts_of(model: VisionLanguageModel) -> list[Part]:
    """The three parts of a model."""
    return [_part(name, model.get_submodule(name)) for name in _PARTS]


def facts_of(model: VisionLanguageModel, processor: Processor) -> dict[str, str]:
    """What a user must know before training or prompting."""
    config, visual = model.config, processor.num_visual_tokens
    vision, text = config.vision_config, config.text_config
    tied = ", embeddings tied" if text.tie_word_embeddings else ""
    left = processor.context_length - visual
    end = processor.end_of_turn
    return {
        "vision tower": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        f"pictures of {vision.image_size}x{vision.image_size} in patches of {vision.patch_size}",
        "language model": f"{text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"vocabulary {text.vocab_size}{tied}",
        "parameters": f"{sum(p.num_parameters for p in parts_of(model)):,}",
        "visual tokens": f"{visual} a picture (feature layer {config.vision_feature_layer}, "
        f"strategy {config.vision_feature_select_strategy})",
        "context": f"{processor.context_length} positions, {left} left for text beside one picture",
        "image token": f"{processor.image_token} ({processor.image_token_id})",
        "end of turn": repr(end) if end else "none in the template: answers end by the tokenizer's",
    }


def render_example(processor: Processor, messages: Sequence[Message] | None = None) -> list[Piece]:
    """A conversation as training sees it; by default one question about one picture."""
    image_id = processor.image_token_id
    grey = Image.new("RGB", (processor.image_size, processor.image_size), "grey")
    chat = messages or [user("what is in the picture?", grey), assistant("a grey square.")]
    encoded = processor.encode(chat)
    rows = zip(encoded.input_ids, encoded.loss_mask, strict=True)
    pieces = []
    for (is_image, learnt), group in groupby(rows, lambda row: (row[0] == image_id, row[1])):
        ids = [number for number, _ in group]
        if is_image:
            text = f"{processor.image_token} x {len(ids)}"
        else:
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append(Piece(text, learnt))
    return pieces


def _part(name: str, module: nn.Module) -> Part:
    parameters = list(module.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    count = sum(p.numel() for p in parameters)
    return Part(name, type(module).__name__, count, ", ".join(dtypes))


def _problems(folder: Path, first: str) -> list[str]:
    """`first` and what else is wrong: each file is tried on its own."""
    problems = [first]
    try:
        config = read_config(folder)
    except CheckpointError as error:
        return list(dict.fromkeys([first, str(error)]))
    for check in (
        lambda: Processor.from_folder(folder, config),
        lambda: load_image_processor(folder, config),
        lambda: shard_paths(folder),
        lambda: read_model(empty_model(config), folder),
    ):
        try:
            check()
        except CheckpointError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))
