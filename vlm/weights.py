"""Weights on disk: safetensors shards, their names, and strict reading.

On disk we write the layout of the published LLaVA folders, which every version of
transformers and the servers built on it read: ``language_model.model.*``,
``language_model.lm_head.*``, ``vision_tower.vision_model.*``, ``multi_modal_projector.*``.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.projector import is_folded, to_disk

if TYPE_CHECKING:
    from vlm.model import VisionLanguageModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "language_model.lm_head.weight"
EMBED = "language_model.model.embed_tokens.weight"
# Longest first; both the legacy and the in-memory spelling of transformers 5 are read.
_RENAMES = (
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Buffers that old versions of transformers stored and that are computed now.
_COMPUTED = (".embeddings.position_ids", ".rotary_emb.inv_freq")


def canonical(name: str) -> str:
    """The name in `VisionLanguageModel` of a tensor on disk."""
    for old, new in _RENAMES:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def on_disk(name: str, vision_kind: str) -> str:
    """The name on disk of a tensor in `VisionLanguageModel`."""
    if vision_kind == "clip_vision_model" and name.startswith("vision_tower."):
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return name


def shard_paths(folder: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises:
        CheckpointError: there are none (pickled weights are refused), or a shard is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX}: not a shard index ({error})") from error
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX}: {name!r} is no safetensors file here")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: shard {name} is missing; download it again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code; convert them "
            "with transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder}: no {SINGLE}; is the download complete?")


def read_tensors(path: Path, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each entry of a safetensors file.

    Raises:
        CheckpointError: the file is truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118  (safe_open has no iterator)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error


def fill(
    target: Mapping[str, torch.Tensor],
    tensors: Iterator[tuple[str, torch.Tensor]],
    where: Path,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Copy `tensors` into `target` in place, with no name left over on either side.

    Raises:
        CheckpointError: missing, unexpected or differently shaped names, or NaN values.
    """
    missing = set(target) - optional
    unexpected: list[str] = []
    mismatched: list[str] = []
    for name, tensor in tensors:
        if name not in target:
            unexpected.append(name)
            continue
        missing.discard(name)
        if target[name].shape != tensor.shape:
            sizes = f"{list(tensor.shape)} in the folder, {list(target[name].shape)} by the config"
            mismatched.append(f"{name} ({sizes})")
        elif tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{where}: {name} holds NaN; the training that wrote it diverged")
        else:
            with torch.no_grad():
                target[name].copy_(tensor)
    problems = {"missing": sorted(missing), "unexpected": unexpected, "mismatched": mismatched}
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{where}: weights and config.json disagree; {'; '.join(found)}")


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_model(model: "VisionLanguageModel", folder: Path) -> None:
    """Fill `model` from the folder, strictly; tied embeddings stay tied.

    Raises:
        CheckpointError: see `fill`; or tied weights that differ on disk.
    """
    state = model.state_dict()
    tied = HEAD in state and state[HEAD].data_ptr() == state[EMBED].data_ptr()
    pair: dict[str, torch.Tensor] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for path in shard_paths(folder):
            for raw_name, tensor in read_tensors(path):
                name = canonical(raw_name)
                if name.endswith(_COMPUTED) or is_folded(name, tensor, model.config):
                    continue
                if tied and name in (HEAD, EMBED):
                    pair[name] = tensor
                yield name, tensor

    fill(state, tensors(), folder, frozenset((HEAD,)) if tied else frozenset())
    if len(pair) == 2 and not torch.equal(pair[HEAD], pair[EMBED]):
        raise CheckpointError(
            f"{folder}: config.json ties {HEAD} to {EMBED} but their values differ; "
            "set tie_word_embeddings to false in config.json and its text_config"
        )


def write_model(
    model: "VisionLanguageModel", folder: Path, state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write config.json, generation_config.json and sharded safetensors into `folder`.

    Each file is written beside its place and then moved, so none is ever torn.

    Raises:
        CheckpointError: an adapter is still attached, or the disk is full.
    """
    state = dict(state if state is not None else model.state_dict())
    if any(".lora_" in name for name in state):
        raise CheckpointError(
            "the model has a LoRA adapter; call vlm.lora.merge first, or vlm.lora.save_adapter"
        )
    if model.config.text_config.tie_word_embeddings:
        state.pop(HEAD, None)
    kind = model.config.vision_config.model_type
    disk = {on_disk(k, kind): v.detach() for k, v in to_disk(state, model.config).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_shards(disk, folder)
        _write_configs(model, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `state` as one file, or as shards of 5 GB with an index."""
    split = split_torch_state_dict_into_shards(state, filename_pattern="model{suffix}.safetensors")
    for name, keys in split.filename_to_tensors.items():
        write_safetensors({key: state[key] for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):
        if old.name not in split.filename_to_tensors:
            old.unlink()


def write_safetensors(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file whole or not at all."""
    part = path.with_name(path.name + ".part")
    plain = {name: tensor.to("cpu").contiguous() for name, tensor in state.items()}
    try:
        save_file(plain, part, metadata={"format": "pt"})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_configs(model: "VisionLanguageModel", folder: Path) -> None:
    config = model.config
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    generation = model.language_model.generation_config
    if generation is not None:
        generation.save_pretrained(folder)
