"""LoRA on the language model: attach, save, load, merge. The only file that knows peft.

Hu et al. 2021, "LoRA". Every linear layer of the decoder blocks is adapted (as QLoRA
does, Dettmers et al. 2023), never the output layer, the vision tower or the projector.
The projector is trained as it is and saved beside the adapter.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from vlm.card import document_adapter
from vlm.errors import CheckpointError, ConfigError
from vlm.folder import ADAPTER_CONFIG as CONFIG
from vlm.folder import ADAPTER_WEIGHTS
from vlm.history import Run, read_history
from vlm.model import VisionLanguageModel
from vlm.projector import PREFIX
from vlm.startup import quiet_bitsandbytes
from vlm.weights import fill, read_tensors, write_safetensors

quiet_bitsandbytes()  # which peft imports
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

ADAPTER, PROJECTOR = ADAPTER_WEIGHTS
_PEFT = "base_model.model."  # peft's own prefix, so that PeftModel opens our adapters


def attach(
    model: VisionLanguageModel,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> VisionLanguageModel:
    """Put an adapter into `model`, in place; it changes no output until it is trained.

    Afterwards only the adapter and the projector require gradients.

    Args:
        model: a model without an adapter.
        r: rank; the update of a weight is ``alpha / r * B @ A`` (``/ sqrt(r)`` with rsLoRA).
        alpha: scale of the update.
        dropout: probability on the adapter's input.
        use_dora: also learn a magnitude per output (Liu et al. 2024).
        use_rslora: rank-stabilised scale (Kalajdzievski 2023).

    Raises:
        ConfigError: a value out of range, or an adapter is attached already.
    """
    if r < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise ConfigError(
            f"LoRA needs r >= 1, alpha > 0 and 0 <= dropout < 1; got r={r}, alpha={alpha}, "
            f"dropout={dropout}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # peft multiplies it: a float is fine
        lora_dropout=dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=_targets(model),
        bias="none",
    )
    _inject(model, config)
    return model


def save_adapter(
    model: VisionLanguageModel, folder: str | os.PathLike[str], training: Run | None = None
) -> None:
    """Write the adapter as peft does, the projector beside it, a vlm.json and a model card.

    Args:
        model: with an adapter.
        folder: to write.
        training: facts of the run that made the adapter; see `vlm.history`.

    Raises:
        CheckpointError: no adapter is attached, or the folder cannot be written.
    """
    folder = Path(folder)
    config = _config(model)
    config.base_model_name_or_path = _base_name(model.name_or_path, folder)
    state = get_peft_model_state_dict(model, _full_state(model), save_embedding_layers=False)
    projector = {PREFIX + k: v for k, v in model.multi_modal_projector.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors({_PEFT + k: v for k, v in state.items()}, folder / ADAPTER)
        write_safetensors(projector, folder / PROJECTOR)
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    document_adapter(folder, model.history, training)


def base_of(folder: Path) -> str:
    """The model that an adapter was made for: a folder that is here, or a hub id.

    Raises:
        CheckpointError: the adapter does not name it, or it is no longer there.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name = raw["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: no base_model_name_or_path ({error})") from error
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{folder}: the adapter does not name its base model; set base_model_name_or_path in "
            f"{CONFIG}"
        )
    beside = folder / name  # relative names count from the adapter, so that both can be moved
    return str(beside) if beside.is_dir() else name


def _base_name(origin: str, folder: Path) -> str:
    """How an adapter in `folder` names the model that came from `origin`."""
    if not Path(origin).is_dir() or not origin:
        return origin
    return os.path.relpath(Path(origin).resolve(), folder.resolve())


def load_adapter(model: VisionLanguageModel, folder: str | os.PathLike[str]) -> VisionLanguageModel:
    """Attach the adapter and the projector that `save_adapter` wrote, in place and strictly.

    Raises:
        CheckpointError: a file is absent or broken, or fits another model.
        ConfigError: an adapter is attached already.
    """
    folder = Path(folder)
    for name in (CONFIG, ADAPTER, PROJECTOR):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; give the folder of vlm.lora.save_adapter")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder / CONFIG}: an adapter of another kind than LoRA")
    if config.target_modules != _targets(model):
        raise CheckpointError(
            f"{folder}: the adapter was made for another language model: it changes "
            f"{config.target_modules}; open the model that it was trained on"
        )
    config.inference_mode = False
    _inject(model, config)
    adapter = get_peft_model_state_dict(model, _full_state(model), save_embedding_layers=False)
    fill({_PEFT + k: v for k, v in adapter.items()}, read_tensors(folder / ADAPTER), folder)
    projector = {PREFIX + k: v for k, v in model.multi_modal_projector.state_dict().items()}
    fill(projector, read_tensors(folder / PROJECTOR), folder)
    model.history = read_history(folder, unknown=model.history)
    return model


def merge(model: VisionLanguageModel) -> VisionLanguageModel:
    """Add the adapter into the weights, in place, and return the plain model.

    Raises:
        CheckpointError: no adapter is attached, or it holds NaN.
    """
    _config(model)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(
                f"{name}: the adapter holds NaN; its training diverged"
            ) from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    return model


def has_adapter(model: nn.Module) -> bool:
    """Whether an adapter is attached and not merged."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def _targets(model: VisionLanguageModel) -> str:
    """A regular expression for every linear layer of the decoder, and for nothing else."""
    decoder = model.language_model.get_decoder()
    names = {
        name.rpartition(".")[2].replace("base_layer", "")
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    leaves = "|".join(sorted(re.escape(name) for name in names if name))
    return rf"language_model\.(?!lm_head).*\.({leaves})"


def _inject(model: VisionLanguageModel, config: LoraConfig) -> None:
    if has_adapter(model):
        raise ConfigError("the model has an adapter already; call vlm.lora.merge first")
    inject_adapter_in_model(config, model)
    model.peft_config = {"default": config}
    model.multi_modal_projector.requires_grad_(True)


def _config(model: VisionLanguageModel) -> LoraConfig:
    if not has_adapter(model):
        raise CheckpointError("the model has no adapter; call vlm.lora.attach first")
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return config


def _full_state(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Adapter tensors only, by their own names: the base weights are not gathered."""
    return {k: v for k, v in model.state_dict().items() if ".lora_" in k}
