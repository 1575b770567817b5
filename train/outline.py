"""The model of a recipe before there is one: its config and its processor, without weights.

A part may be a folder, a hub id (only its small files are fetched), or the output of a run
that comes earlier.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlavaConfig, PretrainedConfig

from train.config import RunConfig, list_recipes, load_config
from train.known_parts import KNOWN_PARTS
from train.stages import PartReport, apply_run
from vlm import lora
from vlm.checkpoint import (
    IMAGE_TOKEN,
    VOCABULARY_MULTIPLE,
    empty_model,
    join_configs,
    name_image_token,
)
from vlm.errors import CheckpointError
from vlm.folder import is_adapter, is_llava, part_config, read_config
from vlm.hub import resolve
from vlm.language import check_language_config, load_tokenizer
from vlm.model import VisionLanguageModel
from vlm.parts import vision_config
from vlm.pixels import ImageProcessor, output_size, read_image_processor, resize_output
from vlm.processor import Processor
from vlm.template import template_with_pictures


def llava_config(config: RunConfig, earlier: Sequence[RunConfig] = ()) -> LlavaConfig | None:
    """The config of the model that a run works on, from the parts' configs alone.

    Args:
        config: of the run.
        earlier: runs that will have been done by then.

    Returns:
        None for the stages that train one part, and where a part is yet to be made by them.

    Raises:
        CheckpointError: a part cannot be used, or the parts do not fit.
    """
    model = config.model
    if config.stage == "instruct":
        assert model.start is not None
        maker = maker_of(model.start, earlier)
        if maker is not None:
            return llava_config(maker, earlier)
        return read_config(start_folder(model.start))
    if config.stage != "align":
        return None
    assert model.vision is not None and model.language is not None
    if maker_of(model.vision, earlier) or maker_of(model.language, earlier):
        return None
    tower, (decoder, image_token_id) = _tower_config(model.vision), _decoder_config(model.language)
    found = join_configs(
        tower, decoder, image_token_id, model.projector, model.vision_feature_layer, None
    )
    found.dtype = decoder.dtype
    return found


def meta_model(
    config: RunConfig, found: LlavaConfig
) -> tuple[VisionLanguageModel, list[PartReport]]:
    """A model without memory, with the run's stage applied, and what trains in it."""
    model = empty_model(found, "meta")
    with torch.device("meta"):
        return model, apply_run(model, config)


def processor_of(config: RunConfig, earlier: Sequence[RunConfig] = ()) -> Processor | None:
    """The processor that a run encodes its records with; None where `llava_config` is None.

    Raises:
        CheckpointError: a file of it is missing or contradicts another one.
    """
    found = llava_config(config, earlier)
    if found is None:
        return None
    if config.stage == "instruct":
        assert config.model.start is not None
        maker = maker_of(config.model.start, earlier)
        if maker is not None:
            made = processor_of(maker.model_copy(update={"template": "chat"}), earlier)
        else:
            made = Processor.from_folder(start_folder(config.model.start), found)
    else:
        assert config.model.vision is not None and config.model.language is not None
        tokenizer = load_tokenizer(resolve(config.model.language, weights=False))
        name_image_token(tokenizer)
        found.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        pixels = _preprocessing(resolve(config.model.vision, weights=False), found)
        template = template_with_pictures(tokenizer, IMAGE_TOKEN)
        made = Processor(tokenizer, pixels, found, None, template)
    return made.plain() if made is not None and config.template == "plain" else made


def maker_of(folder: str, runs: Sequence[RunConfig]) -> RunConfig | None:
    """The run that makes a folder which is not there yet."""
    if (Path(folder) / "config.json").is_file():
        return None
    return next((run for run in reversed(runs) if Path(run.output) == Path(folder)), None)


def shipped_runs() -> dict[str, RunConfig]:
    """All shipped recipes by name."""
    return {name: load_config(name) for name in list_recipes()}


def start_folder(start: str) -> Path:
    """Where the config of a start is: its folder, or that of the adapter's base.

    Raises:
        CheckpointError: there is none; names the shipped recipe that makes it, if one does.
    """
    try:
        folder = resolve(start, weights=False)
        return resolve(lora.base_of(folder), weights=False) if is_adapter(folder) else folder
    except CheckpointError as error:
        makers = [name for name, run in shipped_runs().items() if Path(run.output) == Path(start)]
        if makers and not Path(start).exists():
            raise CheckpointError(
                f"{start}: no such folder yet; `vlm train {makers[0]}` makes it"
            ) from error
        raise


def _tower_config(name: str) -> PretrainedConfig:
    if name in KNOWN_PARTS and not Path(name).is_dir():
        return _without_head(KNOWN_PARTS[name].config())
    folder = resolve(name, weights=False)
    config = copy.deepcopy(vision_config(folder))
    if any((folder / f"{kind}_config.json").is_file() for kind in ("processor", "preprocessor")):
        height, width = output_size(read_image_processor(folder))
        if height is not None and height == width:
            config.image_size = height
    return _without_head(config)


def _without_head(config: PretrainedConfig) -> PretrainedConfig:
    """SigLIP's pooling is not loaded, see `vlm.parts.load_vision_tower`."""
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def _decoder_config(name: str) -> tuple[PretrainedConfig, int]:
    """The decoder's config, its vocabulary grown as `vlm.checkpoint.compose` does; the image id."""
    if name in KNOWN_PARTS and not Path(name).is_dir():
        part = KNOWN_PARTS[name]
        config, image_token_id, count = part.config(), part.num_tokens, part.num_tokens + 1
    else:
        folder = resolve(name, weights=False)
        made = is_llava(folder)
        config = copy.deepcopy(read_config(folder).text_config if made else part_config(folder))
        image_token_id, count = config.vocab_size - 1, config.vocab_size
        if (folder / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(folder)
            name_image_token(tokenizer)
            image_token_id, count = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), len(tokenizer)
    check_language_config(config)
    if count > config.vocab_size:
        config.vocab_size = -(-count // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return config, image_token_id


def _preprocessing(folder: Path, found: LlavaConfig) -> ImageProcessor:
    made, side = read_image_processor(folder), found.vision_config.image_size
    return made if output_size(made) == (side, side) else resize_output(made, side)
