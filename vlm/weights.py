"""Weights on disk: safetensors shards, their names, and strict reading.

`vlm.weight_names` says how tensors are called in a folder and how in a model.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vlm.errors import CheckpointError
from vlm.history import read_history
from vlm.projector import is_folded, to_disk
from vlm.weight_names import WeightNames

if TYPE_CHECKING:
    from vlm.model import VisionLanguageModel

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shard_paths(folder: Path) -> list[Path]:
    """The folder's safetensors files.

    Raises:
        CheckpointError: there are none (pickled weights are refused), or a shard is missing.
    """
    if (folder / INDEX).is_file():
        return indexed_shards(folder, INDEX, ".safetensors")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickled[0]}), which can run code; convert them "
            "with transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{folder}: no {SINGLE}; is the download complete?")


def indexed_shards(folder: Path, index: str, suffix: str) -> list[Path]:
    """The files that an index names, all of which end in `suffix` and lie beside it.

    Raises:
        CheckpointError: the index cannot be read, or a file is missing or of another kind.
    """
    try:
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / index}: not a shard index ({error})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{folder / index}: {name!r} is no {suffix[1:]} file here")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: shard {name} is missing; download it again")
    return [folder / name for name in names]


def read_tensors(path: Path, keep_mapped: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each entry of a safetensors file.

    Args:
        path: of the file.
        keep_mapped: give tensors that are views of the memory-mapped file, all of which
            stays mapped while one of them lives; else copies, and nothing stays mapped.

    Raises:
        CheckpointError: the file is truncated or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if keep_mapped:
                yield from ((name, file.get_tensor(name)) for name in names)
                return
        for name in names:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name).clone()
            yield name, tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); download it again"
        ) from error


def fill(
    target: Mapping[str, torch.Tensor],
    tensors: Iterator[tuple[str, torch.Tensor]],
    where: Path,
    optional: frozenset[str] = frozenset(),
    filled: Callable[[str], None] | None = None,
) -> None:
    """Give `tensors` to `target`, with no name left over on either side.

    A parameter takes its tensor over, so that no second copy of a memory-mapped file is
    made; any other tensor is written into.

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
        elif holds_nan(tensor):
            raise CheckpointError(f"{where}: {name} holds NaN; the training that wrote it diverged")
        else:
            _put(target[name], tensor)
            if filled is not None:
                filled(name)
    problems = {"missing": sorted(missing), "unexpected": unexpected, "mismatched": mismatched}
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{where}: weights and config.json disagree; {'; '.join(found)}")


def holds_nan(tensor: torch.Tensor) -> bool:
    """Whether any value is NaN; costs one pass and no memory where there is none."""
    if not tensor.is_floating_point():
        return False
    total = tensor.sum(dtype=torch.float32)  # NaN stays NaN in a sum; so may infinities become
    return bool(total.isnan()) and bool(tensor.isnan().any())


def _put(target: torch.Tensor, tensor: torch.Tensor) -> None:
    if isinstance(target, nn.Parameter):
        target.data = tensor.to(target.device, target.dtype)
        return
    with torch.no_grad():
        target.copy_(tensor)


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_model(
    model: "VisionLanguageModel", folder: Path, filled: Callable[[str], None] | None = None
) -> None:
    """Fill `model` from the folder, strictly; tied embeddings stay tied. Its history comes along.

    Args:
        model: with the structure that the folder's config describes.
        folder: with safetensors weights.
        filled: called with the name of each tensor once it is in its place. A caller that
            replaces it there gets copies, so that no file stays mapped for their sake.

    Raises:
        CheckpointError: see `fill`; or tied weights that differ on disk, or a broken vlm.json.
    """

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for path in shard_paths(folder):
            yield from read_tensors(path, keep_mapped=filled is None)

    fill_model(model, tensors(), folder, filled)
    model.history = read_history(folder)


def fill_model(
    model: "VisionLanguageModel",
    tensors: Iterable[tuple[str, torch.Tensor]],
    where: Path,
    filled: Callable[[str], None] | None = None,
) -> None:
    """Fill `model` with tensors by any of the names that `WeightNames` reads; see `read_model`.

    Raises:
        CheckpointError: see `fill`; or tied weights that differ; `where` opens the message.
    """
    names = WeightNames(model)
    target: dict[str, torch.Tensor] = model.state_dict()
    target.update(model.named_parameters(remove_duplicate=False))
    tied = target[names.head] is target[names.embeddings]
    pair: dict[str, torch.Tensor] = {}

    def renamed() -> Iterator[tuple[str, torch.Tensor]]:
        for raw_name, tensor in tensors:
            name = names.in_model(raw_name)
            if name is None or is_folded(name, tensor, model.config):
                continue
            if tied and name in (names.head, names.embeddings):
                pair[name] = tensor
            yield name, tensor

    def done(name: str) -> None:
        del target[name]  # or the replaced parameter would live to the end
        if filled is not None:
            filled(name)

    fill(target, renamed(), where, frozenset((names.head,)) if tied else frozenset(), done)
    if len(pair) == 2 and not torch.equal(pair[names.head], pair[names.embeddings]):
        raise CheckpointError(
            f"{where}: config.json ties {names.head} to {names.embeddings} but their values "
            "differ; set tie_word_embeddings to false in config.json and its text_config"
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
    if any(tensor.dtype in (torch.uint8, torch.int8) for tensor in state.values()):
        raise CheckpointError(
            "the model's weights are quantised; open it without quantize to save it"
        )
    names = WeightNames(model)
    if model.config.text_config.tie_word_embeddings:
        state.pop(names.head, None)
    disk = {names.on_disk(k): v.detach() for k, v in to_disk(state, model.config).items()}
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
        part.touch()
        mode = part.stat().st_mode  # as the user's umask has it; save_file makes it private
        save_file(plain, part, metadata={"format": "pt"})
        part.chmod(mode)
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
