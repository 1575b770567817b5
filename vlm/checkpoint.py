"""Open, compose and write model folders. One format: the Hugging Face LLaVA folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from vlm.card import document
from vlm.errors import CheckpointError
from vlm.folder import Folder, check_config, is_adapter, is_llava, read_config
from vlm.history import Run, composed
from vlm.hub import resolve
from vlm.language import check_decoder, load_tokenizer
from vlm.model import VisionLanguageModel
from vlm.parts import load_language_model, load_vision_tower, vision_config
from vlm.pixels import ImageProcessor, output_size, read_image_processor, resize_output
from vlm.processor import Processor
from vlm.projector import HIDDEN_ACT, PROJECTORS
from vlm.template import template_with_pictures
from vlm.vision import num_prefix_tokens, resize_tower
from vlm.weights import read_model, shard_paths, write_model

if TYPE_CHECKING:
    from vlm.quantize import Bits

IMAGE_TOKEN = "<image>"
VOCABULARY_MULTIPLE = 64  # the padding that published LLaVA folders have (32064)


def load_checkpoint(
    folder: Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: "Bits | None" = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Open a LLaVA folder, strictly, in evaluation mode.

    Args:
        folder: with config.json, safetensors weights, tokenizer and processor files; or a
            hub id; or an adapter's folder, whose base model is opened and adapted.
        device: where the weights go.
        dtype: of the weights; by default the one that config.json names, else float32.
        quantize: ``"4bit"`` or ``"8bit"`` for the language model's linear layers.

    Raises:
        CheckpointError: anything in the folder is missing, contradictory or unsafe.
        MissingExtraError: bitsandbytes is needed and cannot be used.
    """
    path = resolve(folder)
    if is_adapter(path):
        return _load_adapted(path, device, dtype, quantize)
    config = read_config(path)
    processor = Processor.from_folder(path, config)
    shard_paths(path)
    model = empty_model(config, device, dtype)
    if quantize is None:
        read_model(model, path)
    else:
        from vlm.quantize import read_quantized

        read_quantized(model, path, quantize)
    if (path / "generation_config.json").is_file():
        model.language_model.generation_config = GenerationConfig.from_pretrained(
            path, local_files_only=True
        )
    model.name_or_path = str(folder)
    return model.eval(), processor


def empty_model(
    config: LlavaConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VisionLanguageModel:
    """A model whose weights are memory that nobody has written to yet."""
    # Layers may draw weights all the same; the caller's random numbers stay as they were.
    with (
        torch.random.fork_rng(devices=[]),
        no_init_weights(),
        torch.device(device),
        _default_dtype(dtype or config.dtype),
    ):
        model = VisionLanguageModel(config)
    model.language_model.tie_weights()  # not done while initialisation is off
    return model


def _load_adapted(
    folder: Path, device: str | torch.device, dtype: torch.dtype | None, quantize: "Bits | None"
) -> tuple[VisionLanguageModel, Processor]:
    """The base model with the adapter in its weights, or beside them if they are quantised."""
    from vlm import lora

    model, processor = load_checkpoint(lora.base_of(folder), device, dtype, quantize)
    lora.load_adapter(model, folder)
    if quantize is None:
        lora.merge(model)
    model.name_or_path = str(folder)
    return model.eval().requires_grad_(False), processor


def save_checkpoint(
    model: VisionLanguageModel,
    processor: Processor,
    folder: Folder,
    training: Run | None = None,
) -> None:
    """Write one standard folder that transformers, and `load_checkpoint`, open as it is.

    Its vlm.json tells what is in it, and its README.md, unless somebody wrote one, tells people.

    Args:
        model: of our own, without an adapter.
        processor: that fits it.
        folder: to write.
        training: facts of the run that just made the weights; the runs before it are known
            from where the model was opened. See `vlm.history`.

    Raises:
        CheckpointError: an adapter is still attached, the weights are quantised, or the
            folder cannot be written.
    """
    folder = Path(folder)
    write_model(model, folder)
    processor.save(folder)
    document(folder, model, processor, training)


def compose(
    vision: Folder,
    language: Folder,
    projector: str = "mlp",
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] | None = None,
    dtype: torch.dtype | None = None,
    image_size: int | None = None,
) -> tuple[VisionLanguageModel, Processor]:
    """Join a vision tower and a language model with a new random projector.

    Args:
        vision: folder or hub id of a CLIP, SigLIP or DINOv2 model or of its vision half
            alone, with its preprocessor_config.json; or a LLaVA folder, whose tower is taken.
        language: folder or hub id of a decoder-only language model with its tokenizer; or a
            LLaVA folder, whose decoder is taken.
        projector: a key of `PROJECTORS`.
        vision_feature_layer: which layer's states are the visual tokens.
        vision_feature_select_strategy: ``"default"`` takes the patches alone, ``"full"``
            the class token too; by default what gives the patches.
        dtype: of the weights; by default the language model's.
        image_size: of the pictures, in pixels; by default what the preprocessing makes.

    Raises:
        CheckpointError: a part cannot be opened or the parts do not fit.
    """
    if projector not in PROJECTORS:
        raise CheckpointError(f"unknown projector {projector!r}; known: {', '.join(PROJECTORS)}")
    vision, language = resolve(vision), resolve(language)
    vision_config(vision)  # a wrong tower is told before a large decoder is loaded
    tokenizer, decoder = _language_part(language, dtype)
    image_processor, tower = _vision_part(vision, decoder.dtype, image_size)
    config = join_configs(
        tower.config,
        decoder.config,
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector,
        vision_feature_layer,
        vision_feature_select_strategy,
    )
    model = VisionLanguageModel(config, tower, decoder)
    model.history = composed(vision, language, projector)
    model.multi_modal_projector.to(decoder.dtype)
    return model.eval(), new_processor(model, tokenizer, image_processor)


def join_configs(
    vision: PretrainedConfig,
    language: PretrainedConfig,
    image_token_id: int,
    projector: str,
    layer: int | list[int],
    strategy: Literal["default", "full"] | None,
) -> LlavaConfig:
    """The config of a model made of these parts; the arguments are those of `compose`.

    Raises:
        CheckpointError: the parts do not fit.
    """
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image_token_id,
        projector_hidden_act=HIDDEN_ACT[projector],
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy or "default",
        tie_word_embeddings=language.tie_word_embeddings,
        **({"projector_type": projector} if projector == "linear" else {}),
    )
    if strategy is None and not num_prefix_tokens(config):
        config.vision_feature_select_strategy = "full"  # all that it has are patches
    config.image_seq_length = check_config(config)
    return config


def new_processor(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor,
) -> Processor:
    """The processor of a model that is not on disk yet, with a template that knows pictures.

    Raises:
        CheckpointError: the parts contradict each other.
    """
    template = template_with_pictures(tokenizer, IMAGE_TOKEN)
    generation = model.language_model.generation_config
    return Processor(tokenizer, image_processor, model.config, generation, template)


def _language_part(
    folder: Path, dtype: torch.dtype | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer with an image token, and a decoder whose vocabulary has a row for it."""
    tokenizer = load_tokenizer(folder)
    if is_llava(folder):
        decoder = load_checkpoint(folder, dtype=dtype)[0].language_model
    else:
        decoder = load_language_model(folder, dtype)
        check_decoder(decoder)
    add_image_token(tokenizer, decoder)
    return tokenizer, decoder


def add_image_token(tokenizer: PreTrainedTokenizerBase, decoder: PreTrainedModel) -> None:
    """Give the tokenizer an image token and the decoder rows for all tokens, in place."""
    name_image_token(tokenizer)
    grow_vocabulary(decoder, len(tokenizer))


def name_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer an image token if it has none, in place."""
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )


def grow_vocabulary(decoder: PreTrainedModel, num_tokens: int) -> None:
    """Give the decoder rows for `num_tokens`, if it lacks some, in place.

    The vocabulary is padded to a multiple of 64. New rows are the mean of the old ones, as
    LLaVA starts them: a row near zero could beat every real token's negative logit.
    """
    old = decoder.get_input_embeddings().num_embeddings
    if num_tokens <= old:
        return
    decoder.resize_token_embeddings(num_tokens, VOCABULARY_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(dim=0, dtype=torch.float32)


def _vision_part(
    folder: Path, dtype: torch.dtype, image_size: int | None
) -> tuple[ImageProcessor, PreTrainedModel]:
    """Preprocessing and tower, both for pictures of one size."""
    if is_llava(folder):
        tower = load_checkpoint(folder, dtype=dtype)[0].vision_tower
    else:
        tower = load_vision_tower(folder, dtype)
    processor = read_image_processor(folder)
    made = output_size(processor)
    size = image_size or (made[0] if made[0] == made[1] else None) or tower.config.image_size
    if made != (size, size):
        processor = resize_output(processor, size)
    if tower.config.image_size != size:
        resize_tower(tower, size)
    return processor, tower


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Build modules in `dtype`; None keeps float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
