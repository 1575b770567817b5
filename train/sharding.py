"""One model over several processes: what each holds, and the whole again for writing.

``none`` is data-parallel: every process holds all of it. ``fsdp2`` gives each process a
slice of every parameter, gradient and optimiser state (torch's `fully_shard`), on GPUs and
CPUs alike. ``zero2`` and ``zero3`` are DeepSpeed's, through Trainer.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from train.config import RunConfig
from vlm.caption_ranks import ranks_of_environment
from vlm.errors import ConfigError, MissingExtraError

_LAUNCH = Path(__file__).with_name("launch")
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_TOLD = (_FSDP, _DEEPSPEED, "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS")


def check_sharding(config: RunConfig) -> None:
    """Tell before anything is loaded what cannot be sharded, and agree with the launcher.

    Raises:
        ConfigError: there is one process only, the launcher was told something else, or
            another setting excludes sharding.
        MissingExtraError: DeepSpeed is not installed.
    """
    launched = _launched()
    if launched not in (None, config.sharding):
        raise ConfigError(
            f"the launcher was told {launched}, the recipe says sharding={config.sharding}; add "
            f"sharding={launched} to the recipe, or launch with train/launch/ddp.yaml"
        )
    for key in [key for key in os.environ if key.startswith(_TOLD)]:
        del os.environ[key]  # accelerate would shard a second time, by settings of its own
    if config.sharding == "none":
        return
    world = ranks_of_environment()[1]
    if world == 1:
        raise ConfigError(
            f"sharding={config.sharding} needs several processes and there is one; start them by "
            "torchrun --nproc-per-node N --no-python vlm train ..., or set sharding=none"
        )
    if config.batches.feature_cache is not None:
        raise ConfigError(
            f"batches.feature_cache and sharding={config.sharding} exclude each other: the tower "
            "would be asked outside of the model's forward; drop one of them"
        )
    if config.sharding == "fsdp2":
        _check_fsdp(config)
    elif importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(
            f"sharding={config.sharding} needs DeepSpeed: pip install 'vlm[deepspeed]'"
        )


def _launched() -> str | None:
    """The sharding that `accelerate launch` was told, if it was told any."""
    if os.environ.get(_FSDP, "false").lower() == "true":
        return "fsdp2"
    stage = os.environ.get(_STAGE)  # Trainer sets the switch as well, but not this
    if stage is not None and os.environ.get(_DEEPSPEED, "false").lower() == "true":
        return f"zero{stage}"
    return None


def _check_fsdp(config: RunConfig) -> None:
    if config.model.quantize is not None:
        raise ConfigError(
            f"model.quantize={config.model.quantize} cannot be sharded by fsdp2: packed weights "
            "have no slices; set sharding=none"
        )
    if config.optimizer == "muon":
        raise ConfigError(
            "optimizer=muon cannot be sharded by fsdp2: it needs whole matrices; use adamw"
        )


def deepspeed_config(config: RunConfig) -> dict[str, Any] | None:
    """DeepSpeed's own settings for the recipe, None without DeepSpeed."""
    if not config.sharding.startswith("zero"):
        return None
    path = _LAUNCH / f"{config.sharding}.json"
    return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))


def shard(model: nn.Module, device: torch.device, world_size: int) -> None:
    """Give each rank its slice of every parameter, in place; the model moves to the device.

    Each block of a stack of layers is one unit: its parameters are whole only while it
    computes. The rest is the root's, whole from the start of the forward to the end of the
    backward pass; so the loss may take the output layer's weight as it is.

    Args:
        model: the same on all ranks.
        device: of this rank.
        world_size: of the process group, which exists.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_sharded(model, world_size)


def check_sharded(model: nn.Module, world_size: int) -> None:
    """Raise unless every parameter is spread over all ranks.

    Raises:
        ConfigError: one is not; the run would not have the memory it was planned for.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() != world_size:
            raise ConfigError(
                f"{name} is not spread over {world_size} processes though sharding=fsdp2; set "
                "sharding=none, or report this with the versions of torch and transformers"
            )


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of modules: encoder and decoder layers."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A parameter or state without its slices; sharded ones come to the CPU.

    Every rank must call this for the same tensors in the same order.
    """
    if isinstance(tensor, DTensor):
        whole: Tensor = cast(DTensor, tensor.detach()).full_tensor()
        return whole.cpu()
    if hasattr(tensor, "ds_id"):  # DeepSpeed ZeRO-3 keeps a parameter's slice elsewhere
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.detach()


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, laid out like another one; no rank is asked."""
    if not isinstance(like, DTensor):
        return whole
    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: Any, *, keep: bool) -> Any:
    """An optimiser's state with whole tensors; ranks that do not keep it get nothing."""
    if isinstance(state, dict):
        return {key: whole_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value, keep=keep) for value in state]
    if isinstance(state, Tensor):
        tensor = whole_tensor(state)
        return tensor if keep else None
    return state


def local_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The slices of a whole optimiser state that belong to this rank's parameters.

    Args:
        state: of `whole_state`, whose keys in ``state`` count the parameters.
        parameters: in the order of the optimiser's groups.
    """
    mine = {
        number: {
            key: local_part(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": mine}


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters are whole, so that the model can be written; all ranks enter.

    A model of `shard` stays whole and cannot be trained on; ranks but the first lose theirs.
    """
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
        return
    _gather(model)
    yield


def _gather(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the root's parameters whole, for a while
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may have two places
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in whole:
                tensor = whole_tensor(parameter)
                whole[parameter] = nn.Parameter(tensor, parameter.requires_grad)
            module.register_parameter(name, whole[parameter])
