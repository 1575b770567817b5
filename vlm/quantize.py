"""4-bit and 8-bit weights for the language model. The only file that knows bitsandbytes.

NF4 with double quantisation (Dettmers et al. 2023, "QLoRA") or LLM.int8 (Dettmers et al.
2022), for every linear layer of the decoder but the output layer. Vision tower, projector
and output layer keep their numbers: they are small, and what they lose is seen at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from vlm.errors import ConfigError, MissingExtraError
from vlm.model import VisionLanguageModel
from vlm.startup import quiet_bitsandbytes
from vlm.weights import read_model

Bits = Literal["4bit", "8bit"]
# bitsandbytes' CPU kernel for 4 bits packs whole blocks of so many inputs and outputs, and
# fails on other sizes; layers of such sizes stay as they are.
_BLOCK_IN, _BLOCK_OUT = 64, 32


def check_bits(quantize: str) -> None:
    """Raise ConfigError unless `quantize` is ``"4bit"`` or ``"8bit"``."""
    if quantize not in get_args(Bits):
        raise ConfigError(f"unknown quantize {quantize!r}; known: {', '.join(get_args(Bits))}")


def read_quantized(model: VisionLanguageModel, folder: Path, bits: Bits) -> None:
    """Fill `model` from the folder; each linear layer is quantised as soon as it is read.

    No more than one layer is in memory at full size.

    Raises:
        CheckpointError: see `vlm.weights.read_model`.
        ConfigError: unknown bits, or a model of sizes that no kernel takes.
        MissingExtraError: bitsandbytes cannot be used here.
    """
    check_bits(bits)
    bnb = _bitsandbytes()
    layers = {name: layer for name, layer in _linears(model) if bits == "8bit" or _fits(layer)}
    if not layers:
        raise ConfigError(
            f"quantize={bits!r}: no linear layer of this model has a multiple of {_BLOCK_IN} "
            f"inputs and of {_BLOCK_OUT} outputs; use quantize='8bit', or none for so small a model"
        )

    def read(name: str) -> None:
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in layers:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], _quantized(bnb, layers.pop(path), bits))

    read_model(model, folder, read)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers multiply in another type than the one their folder was stored in.

    A run's own: float16, as many folders are, has too small a range for training.
    """
    kind = _bitsandbytes().nn.Linear4bit
    for module in model.modules():
        if isinstance(module, kind):
            module.compute_dtype = dtype


def is_quantized(model: nn.Module) -> bool:
    """Whether some layers hold quantised weights."""
    return any(getattr(p, "quant_type", None) or hasattr(p, "SCB") for p in model.parameters())


def _linears(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if name.startswith("language_model.") and module is not head and type(module) is nn.Linear:
            yield name, module


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % _BLOCK_IN == 0 and layer.out_features % _BLOCK_OUT == 0


def _quantized(bnb: Any, layer: nn.Linear, bits: Bits) -> nn.Module:
    """The layer's weights in bitsandbytes' form, on the same device."""
    device = layer.weight.device
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    with torch.device("meta"):
        if bits == "4bit":
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    if bits == "4bit":
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", module=new
        )
    else:
        new.weight = bnb.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
    new.bias = layer.bias
    return new.to(device)


def _bitsandbytes() -> Any:
    quiet_bitsandbytes()
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # a wrong CUDA library fails at import
        reason = " ".join(str(error).split())
        raise MissingExtraError(
            f"quantize needs bitsandbytes, which cannot be used here ({reason}); "
            "pip install 'vlm[quantize]'"
        ) from error
    return bitsandbytes
