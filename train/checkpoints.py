"""Checkpoints of a run: written aside, then moved into place whole; and who may write.

A folder ``checkpoint-N`` exists only once all its files are on the disk, and an older one
goes only after that. So a kill, a full disk or a power cut leaves the last whole one.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.ranks import is_first_rank
from train.sharding import local_part, local_state, whole_state, whole_tensor
from vlm.errors import CheckpointError, ConfigError, DivergenceError
from vlm.ledger_rows import open_locked

CHECKPOINTS = "checkpoints"  # below a run's output folder
STATE = "trainer_state.json"
_TRAINED = "trained.safetensors"
_OPTIMIZER, _SCHEDULE = "optimizer.pt", "scheduler.pt"  # Trainer's names
_ASIDE = ".writing"
_LOCK = "run.lock"
_KEPT = 2


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: Trainer writes its own state last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE}") if _is_json(path)]
    return max(whole, key=_step, default=None)


def aside(folder: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return folder / _ASIDE


def clear_aside(folder: Path) -> None:
    """Remove what a killed run left half written."""
    shutil.rmtree(aside(folder), ignore_errors=True)


def move_into_place(folder: Path) -> None:
    """Give the checkpoint that was written aside its name, then let the oldest go."""
    for written in aside(folder).iterdir():
        for path in [*written.rglob("*"), written]:
            _to_disk(path)
        shutil.rmtree(folder / written.name, ignore_errors=True)  # of a torn one, if any
        written.replace(folder / written.name)
    _to_disk(folder)
    known = sorted((path.parent for path in folder.glob(f"checkpoint-*/{STATE}")), key=_step)
    for old in known[:-_KEPT]:
        shutil.rmtree(old)


@contextlib.contextmanager
def telling_full_disk(what: str) -> Iterator[None]:
    """Failed writes inside become errors that say what could not be written.

    Raises:
        CheckpointError: the disk is full, a quota is reached, or a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save tells of a failed write by a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{what} cannot be written ({reason}); make room for it, then the same command goes on"
        ) from error


def trained_tensors(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole trained parameters by name; of a sharded model every rank must call this.

    Args:
        model: trained parameters are those that require gradients.
        keep: whether this rank wants them; the others get nothing.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = whole_tensor(parameter)
            if keep:
                tensors[name] = tensor.contiguous()
    return tensors


def save_trained(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write trained parameters.

    Raises:
        DivergenceError: one is not finite; nothing is written.
    """
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise DivergenceError(
            f"{len(bad)} trained parameters are no longer finite ({bad[0]}, ...); no checkpoint "
            "was written of them; lower learning_rate"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _TRAINED)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put what `save_trained` wrote into a model that trains the same parameters.

    Raises:
        CheckpointError: it trains others.
    """
    path = folder / _TRAINED
    saved = load_file(path)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())
        raise CheckpointError(
            f"{path} holds other parameters than this run trains ({', '.join(odd[:4])}); "
            "choose another output folder"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(local_part(saved[name], parameter))


def save_sharded_optimizer(optimizer: Any, schedule: Any, folder: Path, *, write: bool) -> None:
    """Write both states whole, as an unsharded run does; every rank must call this."""
    state = whole_state(optimizer.state_dict(), keep=write)
    if write:
        torch.save(state, folder / _OPTIMIZER)
        torch.save(schedule.state_dict(), folder / _SCHEDULE)


def load_sharded_optimizer(optimizer: Any, schedule: Any, folder: Path) -> None:
    """Read what `save_sharded_optimizer` wrote, each rank its own slices."""
    state = torch.load(folder / _OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(local_state(state, parameters))
    schedule.load_state_dict(torch.load(folder / _SCHEDULE, weights_only=True))


@contextlib.contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold an output folder for one run; its other ranks pass.

    Raises:
        ConfigError: a living process trains there.
    """
    if not is_first_rank():
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    path = output / _LOCK
    try:
        lock = open_locked(path)
    except ConfigError as error:
        raise ConfigError(
            f"another run is training in {output}; wait for it or choose another output=DIR"
        ) from error
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: nobody takes a file that is gone


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
