"""What a stage works on: its model, its collator, and how the result is written."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers import CLIPImageProcessorPil as CLIPPil

from train.collate import PairCollator, TextCollator
from train.config import LanguageSize, RunConfig
from train.contrastive import DualEncoder, new_vision_tower
from train.dataset import RecordDataset
from train.dialogues import Dialogues
from train.liger import apply_liger
from train.stages import apply_run
from train.tokenizer import texts_of, train_tokenizer
from vlm import lora as adapters
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.history import History, Run, read_history
from vlm.hub import resolve
from vlm.language import load_tokenizer
from vlm.manifest import describe, weight_files, write_manifest
from vlm.model import VisionLanguageModel
from vlm.processor import Processor
from vlm.quantize import compute_in

_TOKENIZER_RECORDS = 5000


@dataclass(frozen=True)
class Job:
    """A stage made concrete.

    Attributes:
        model: what is trained, and frozen, in training mode.
        collate: records to a batch of keyword arguments for the model.
        write: writes the finished model and the record of its run into a folder, the
            record last.
        around: surrounds a forward and backward pass; gives what the model takes of a batch.
        notes: lines for people, before the run starts.
        dialogues: of stages whose records have pictures.
    """

    model: nn.Module
    collate: Callable[..., dict[str, Any]]
    write: Callable[[Path, Run], None]
    around: Callable[[dict[str, Any]], AbstractContextManager[dict[str, Any]]] = nullcontext
    notes: tuple[str, ...] = ()
    dialogues: Dialogues | None = None


def contrastive_job(config: RunConfig, data: RecordDataset) -> Job:
    """A vision tower, new or from a folder, beside a small text tower."""
    before: History = ()
    if config.model.vision is None:
        size = config.model.new_vision
        assert size is not None
        tokenizer = train_tokenizer(texts_of(data, _TOKENIZER_RECORDS), size.text_vocab_size)
        model = DualEncoder(new_vision_tower(size), len(tokenizer))
    else:
        folder = Path(config.model.vision)
        before = read_history(folder)
        tokenizer = load_tokenizer(folder)
        model = DualEncoder.from_folder(folder, len(tokenizer))
    side = model.vision_tower.config.image_size
    square = {"height": side, "width": side}
    preprocessing = CLIPPil(size={"shortest_edge": side}, crop_size=square)

    def write(folder: Path, run: Run) -> None:
        model.save(folder)
        preprocessing.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, describe(weight_files(folder), before, run))

    return Job(model, PairCollator(tokenizer, preprocessing, side), write)


def language_job(config: RunConfig, data: RecordDataset) -> Job:
    """A decoder, new or from a folder, on texts alone."""
    model: Any
    tokenizer: PreTrainedTokenizerBase
    before: History = ()
    if config.model.language is None:
        size = config.model.new_language
        assert size is not None
        tokenizer = train_tokenizer(texts_of(data, _TOKENIZER_RECORDS), size.vocab_size)
        model = LlamaForCausalLM(_llama(size, tokenizer))
    else:
        before = read_history(Path(config.model.language))
        tokenizer = load_tokenizer(Path(config.model.language))
        model = AutoModelForCausalLM.from_pretrained(config.model.language)

    def write(folder: Path, run: Run) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_manifest(folder, describe(weight_files(folder), before, run))

    return Job(model, TextCollator(tokenizer, model.config.max_position_embeddings), write)


def align_job(config: RunConfig, data: RecordDataset) -> Job:
    """Tower and decoder joined by a new projector."""
    assert config.model.vision is not None and config.model.language is not None
    vision, language = resolve(config.model.vision), resolve(config.model.language)
    model, processor = compose(
        vision,
        language,
        projector=config.model.projector,
        vision_feature_layer=config.model.vision_feature_layer,
    )
    processor = _preprocessing(processor, config.model.preprocessing)

    def write(folder: Path, run: Run) -> None:
        save_checkpoint(model, processor, folder, run)

    return _dialogue_job(config, model, processor, write)


def instruct_job(config: RunConfig, data: RecordDataset) -> Job:
    """An aligned model; what LoRA learnt is kept as an adapter and merged into the folder."""
    assert config.model.start is not None
    start, bits = config.model.start, config.model.quantize
    model, processor = load_checkpoint(start, quantize=bits)
    processor = _preprocessing(processor, config.model.preprocessing)
    if bits is not None:
        compute_in(model, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)

    def write(folder: Path, run: Run) -> None:
        whole = model
        if config.lora is not None:
            adapters.save_adapter(model, folder / "adapter", run)
            if bits is not None:  # the adapter goes into the weights of full precision
                whole = adapters.load_adapter(load_checkpoint(start)[0], folder / "adapter")
                whole.history = model.history  # the adapter's has this run already
            adapters.merge(whole)
        save_checkpoint(whole, processor, folder, run)

    return _dialogue_job(config, model, processor, write)


def _preprocessing(processor: Processor, how: str) -> Processor:
    """The processor with pictures cropped, or padded by the mean colour, to a square."""
    if how == "keep":
        return processor
    before = processor.image_processor.to_dict()
    names = ("resample", "rescale_factor", "image_mean", "image_std")
    side = processor.image_size
    kind, more = (LlavaImageProcessorPil, {"do_pad": True}) if how == "pad" else (CLIPPil, {})
    made = kind(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        **{name: before[name] for name in names if before.get(name) is not None},
        **more,
    )
    return processor.with_image_processor(made)


def _dialogue_job(
    config: RunConfig,
    model: VisionLanguageModel,
    processor: Processor,
    write: Callable[[Path, Run], None],
) -> Job:
    if config.liger:
        apply_liger(model.language_model)
    seen = processor.plain() if config.template == "plain" else processor
    dialogues = Dialogues(model, seen, config.batches)
    notes = []
    if dialogues.padded_because is not None:
        notes.append(f"batches are padded and not packed: {dialogues.padded_because}")
    return Job(model, dialogues.collate, write, dialogues.around, tuple(notes), dialogues)


JOBS: dict[str, Callable[[RunConfig, RecordDataset], Job]] = {
    "contrastive": contrastive_job,
    "language": language_job,
    "align": align_job,
    "instruct": instruct_job,
}


def rebuild(config: RunConfig, data: RecordDataset, trained: nn.Module) -> Job:
    """The job anew, its frozen weights as they are stored, with what another one has learnt."""
    job = JOBS[config.stage](config, data)
    apply_run(job.model, config)
    learnt = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(learnt.pop(name))
    assert not learnt, f"another model was trained: {sorted(learnt)[:4]}"
    return job


def _llama(size: LanguageSize, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=size.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
