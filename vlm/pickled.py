"""Weights in PyTorch pickles, read as tensors and as nothing else.

A pickle is a program. torch runs it with `weights_only`, which knows the instructions that
make tensors and refuses all others; what is no plain tensor afterwards is refused here.
Only `vlm.original` reads pickles: it writes what was in them as safetensors, once.
"""

import re
import zipfile
from pathlib import Path

import torch

from vlm.errors import CheckpointError
from vlm.weights import INDEX, SINGLE, indexed_shards, read_tensors, shard_paths

FILES = ("*.bin",)  # what the hub is asked for besides the files of a standard folder
_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, or else its pickles; an empty list if it has neither.

    Raises:
        CheckpointError: an index is broken, or a shard that it names is missing.
    """
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return shard_paths(folder)
    if (folder / _INDEX).is_file():
        return indexed_shards(folder, _INDEX, ".bin")
    return [folder / _SINGLE] if (folder / _SINGLE).is_file() else []


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder by name, memory-mapped, so that none is in memory yet.

    Raises:
        CheckpointError: there are none, a file is broken, or a name is there twice.
    """
    files = weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no {_SINGLE} or {SINGLE}; is the download complete?")
    found: dict[str, torch.Tensor] = {}
    for path in files:
        tensors = read_file(path)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{path}: {twice[0]} is in another shard too; download it again")
        found.update(tensors)
    return found


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one safetensors file or one pickle, memory-mapped.

    Raises:
        CheckpointError: the file is broken, or holds anything besides tensors.
    """
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    try:
        # The format before PyTorch 1.6 is no zip file and cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name}; is the download complete?"
        ) from error
    except Exception as error:  # a pickle is a program: it can fail in every way there is
        raise CheckpointError(
            f"{path}: holds more than tensors, or is damaged, and is refused ({_reason(error)}); "
            "get the weights from where you trust them, as safetensors if there are any"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(
                f"{path}: {str(name)[:100]!r} is a {type(value).__name__} and no plain tensor; "
                "refused, save the tensors alone"
            )
    return _unshared(loaded)


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each with memory of its own: safetensors cannot write shared ones."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        shared = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        result[name] = tensor.detach().clone() if shared else tensor.detach()
    return result


def _reason(error: Exception) -> str:
    """What torch found, without its advice to switch the check off."""
    text = " ".join(str(error).split())
    called = re.search(r"GLOBAL ([\w.]+)", text)
    if called:
        return f"it asks for {called[1]}"
    found = text.partition("WeightsUnpickler error: ")[2] or text
    return re.split(r"\. | Check the doc", found)[0][:150] or type(error).__name__


def _is_plain(value: object) -> bool:
    """Whether this is a tensor with a number in memory for each element."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
