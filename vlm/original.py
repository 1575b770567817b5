"""Folders of the original LLaVA repository, made into standard ones.

github.com/haotian-liu/LLaVA writes three layouts (``llava/train/train.py``) and reads them
again in ``llava/model/builder.py``:

    a whole model   config.json, pytorch_model*.bin
    a projector     config.json, mm_projector.bin: what the first stage trains
    an adapter      config.json, adapter_config.json, adapter_model.bin, non_lora_trainables.bin

The last two need the language model that they were trained on; all need the vision tower,
which config.json names. All weights stay memory-mapped until they are written.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from vlm.checkpoint import (
    IMAGE_TOKEN,
    add_image_token,
    empty_model,
    join_configs,
    new_processor,
    save_checkpoint,
)
from vlm.errors import CheckpointError, ConfigError
from vlm.folder import ADAPTER_CONFIG, Folder, is_llava, one_line, read_json
from vlm.hub import resolve
from vlm.language import check_decoder
from vlm.model import VisionLanguageModel
from vlm.original_config import Settings, read_settings, read_text_config
from vlm.original_lora import Adapter, read_adapter
from vlm.original_tokenizer import read_tokenizer
from vlm.parts import NOT_THE_TOWER, vision_config
from vlm.pickled import FILES, read_file, read_folder, weight_files
from vlm.pixels import load_image_processor, pad_to_square
from vlm.processor import Processor
from vlm.template import DEFAULT_TEMPLATE
from vlm.weight_names import WeightNames
from vlm.weights import fill_model

Tensors = dict[str, torch.Tensor]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROJECTOR_FILE = "mm_projector.bin"
_REST_FILE = "non_lora_trainables.bin"
# Of the original layout and of the standard one; what is not here is the language model's.
_SPELLINGS = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.", "multi_modal_projector.linear_1."),  # one layer has no number
)


def import_original(
    old: Folder, out: Folder, *, vision: Folder | None = None, language: Folder | None = None
) -> list[str]:
    """Write the standard folder of a model in the original LLaVA repository's layout.

    Args:
        old: folder or hub id of a whole model, a projector, or an adapter; see above.
        out: folder to write; it appears when it is complete.
        vision: folder or hub id of the vision tower, with its preprocessor_config.json; by
            default the one that config.json names. Tower weights in `old` replace its own.
        language: folder or hub id of the language model under a projector or an adapter, in
            any layout; by default the one that the folder names.

    Returns:
        What was written, one fact a line.

    Raises:
        CheckpointError: a folder cannot be read, is unsafe, needs what a standard folder has
            no place for, or cannot be written; or `out` is there already.
        ConfigError: `language` is given for a whole model.
        MissingExtraError: the tokenizer has to be converted by packages that are absent.
    """
    target = Path(os.path.abspath(out))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{out}: is there already; nothing is overwritten, name a new folder")
    folder = resolve(old, FILES)
    settings = read_settings(folder)
    own, adapter, whole = _own_weights(folder)
    if whole and language is not None:
        raise ConfigError(f"{folder}: a whole model has its language model; leave out --language")
    base = folder
    if not whole:
        base = _part(folder, language, _base_name(folder), "language model", "--language")
    tower = _part(folder, vision, settings.tower, "vision tower", "--vision")
    weights = own if whole else read_folder(base)
    text = read_text_config(base)
    tokenizer = read_tokenizer(base, text)  # what can be refused is, before weights are read
    model = _empty_model(settings, text, tower, weights)
    image_processor = load_image_processor(tower, model.config)
    names = WeightNames(model)
    merged = _in_model(names, own, _spelled)
    if not whole:
        merged = {**_base_weights(names, base, weights), **merged}
    if weight_files(tower) or not any(name.startswith("vision_tower.") for name in merged):
        merged = {**_tower_weights(names, tower), **merged}
    fill_model(model, _adapted(names, merged, adapter), folder)
    check_decoder(model.language_model)
    if settings.pad:
        image_processor = pad_to_square(image_processor)
    if settings.max_length is not None:
        tokenizer.model_max_length = settings.max_length
    add_image_token(tokenizer, model.language_model)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    _read_generation(model, base)
    processor = new_processor(model.eval(), tokenizer, image_processor)
    _write(model, processor, target)
    return _facts(model, settings, adapter, processor.chat_template == DEFAULT_TEMPLATE)


def _own_weights(folder: Path) -> tuple[Tensors, Adapter | None, bool]:
    """What the folder itself holds: full weights, an adapter, and whether it is a whole model."""
    if (folder / ADAPTER_CONFIG).is_file():
        return read_file(folder / _REST_FILE), read_adapter(folder), False
    if weight_files(folder):
        return read_folder(folder), None, True
    if (folder / _PROJECTOR_FILE).is_file():
        return read_file(folder / _PROJECTOR_FILE), None, False
    raise CheckpointError(
        f"{folder}: neither a whole model (pytorch_model.bin), a projector ({_PROJECTOR_FILE}) nor "
        f"an adapter ({ADAPTER_CONFIG}); is the download complete?"
    )


def _base_name(folder: Path) -> str | None:
    """The language model that a projector or an adapter was trained on, as it is named."""
    name = read_json(folder, "config.json").get("_name_or_path")
    if (folder / ADAPTER_CONFIG).is_file():
        name = read_json(folder, ADAPTER_CONFIG).get("base_model_name_or_path") or name
    return name if isinstance(name, str) and name else None


def _part(folder: Path, given: Folder | None, named: str | None, what: str, option: str) -> Path:
    """The folder of a part: the one given, else the one named."""
    if given is not None:
        return resolve(given, FILES)
    if named is None:
        raise CheckpointError(f"{folder}: no {what} is named; give it with {option} FOLDER")
    try:
        return resolve(named, FILES)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: its {what} {named!r} is not at hand; give it with {option} FOLDER ({error})"
        ) from error


def _empty_model(
    settings: Settings, text: PretrainedConfig, tower: Path, weights: Tensors
) -> VisionLanguageModel:
    """A model without weights; `weights` are the language model's, for their dtype."""
    vision = vision_config(tower)
    if settings.width not in (None, vision.hidden_size):
        raise CheckpointError(
            f"{tower}: the vision tower has width {vision.hidden_size} but the projector takes "
            f"{settings.width}; give the tower {settings.tower!r} with --vision FOLDER"
        )
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False  # SigLIP's pooling; visual tokens are taken before it
    floating = (t.dtype for t in weights.values() if t.is_floating_point())
    dtype = text.dtype or next(floating, torch.float32)
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"the language model's weights are {dtype}; use a copy in one of "
            f"{', '.join(map(str, _DTYPES))}"
        )
    text.dtype = vision.dtype = dtype
    # The id of <image> is set once the tokenizer is read.
    config = join_configs(vision, text, 0, settings.projector, settings.layer, settings.strategy)
    return empty_model(config, dtype=dtype)


def _in_model(names: WeightNames, tensors: Tensors, spelled: Callable[[str], str]) -> Tensors:
    """Tensors by the names that the model has for them."""
    result: Tensors = {}
    for raw_name, tensor in tensors.items():
        name = names.in_model(spelled(raw_name))
        if name in result:
            raise CheckpointError(f"{raw_name} is there twice, by two names; remove one of them")
        if name is not None:
            result[name] = tensor
    return result


def _spelled(name: str) -> str:
    """The standard name of a tensor in the original layout, or of a bare language model's."""
    name = name.removeprefix("base_model.model.")
    for old, new in _SPELLINGS:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return "language_model." + name


def _base_weights(names: WeightNames, base: Path, weights: Tensors) -> Tensors:
    """The language model's; and tower and projector, where the base is an original one too."""
    if not is_llava(base):
        return _in_model(names, weights, _spelled)
    everything = _in_model(names, weights, str)
    return {name: t for name, t in everything.items() if name.startswith("language_model.")}


def _tower_weights(names: WeightNames, tower: Path) -> Tensors:
    tensors = read_folder(tower)
    if is_llava(tower):
        everything = _in_model(names, tensors, str)
        return {name: t for name, t in everything.items() if name.startswith("vision_tower.")}
    kept = {name: t for name, t in tensors.items() if not name.startswith(NOT_THE_TOWER)}
    return _in_model(names, kept, "vision_tower.{}".format)


def _adapted(
    names: WeightNames, weights: Mapping[str, torch.Tensor], adapter: Adapter | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights, the adapter added to those that it changes, one at a time."""
    updates = {names.in_model(_spelled(name)): name for name in (adapter.pairs if adapter else ())}
    unknown = [old for new, old in updates.items() if new not in weights]
    if unknown:
        raise CheckpointError(
            f"the adapter changes {len(unknown)} weights that the language model does not have: "
            f"{', '.join(unknown[:3])}; give the one that it was trained on with --language FOLDER"
        )
    for name, tensor in weights.items():
        if adapter is not None and name in updates:
            tensor = adapter.merged(updates[name], tensor)
        yield name, tensor


def _read_generation(model: VisionLanguageModel, base: Path) -> None:
    if not (base / "generation_config.json").is_file():
        return
    try:
        found = GenerationConfig.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{base}: generation_config.json: {one_line(error)}") from error
    model.language_model.generation_config = found


def _write(model: VisionLanguageModel, processor: Processor, target: Path) -> None:
    """Write beside the target and then move, so that no half folder is ever found there."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        save_checkpoint(model, processor, part)
        os.replace(part, target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _facts(
    model: VisionLanguageModel, settings: Settings, adapter: Adapter | None, is_default: bool
) -> list[str]:
    config = model.config
    text, vision = config.text_config, config.vision_config
    facts = [
        f"language model: {text.model_type}, {text.num_hidden_layers} layers of width "
        f"{text.hidden_size}, {text.vocab_size} tokens, {str(model.dtype).removeprefix('torch.')}",
        f"vision tower: {vision.model_type}, {vision.image_size}x{vision.image_size} pixels, "
        f"{config.image_seq_length} visual tokens of layer {settings.layer}",
        f"projector: {settings.projector}, {vision.hidden_size} -> {text.hidden_size}",
        "pictures: " + ("padded to a square" if settings.pad else "as the vision tower's own"),
        "prompt: " + ("LLaVA-1.5's" if is_default else "the tokenizer's own template"),
    ]
    if adapter is not None:
        facts.append(f"adapter: merged into {len(adapter.pairs)} weights")
    return facts
