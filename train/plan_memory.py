"""The memory of a training step by part, from configs.

Weights, gradients and optimiser states are counted to the byte. Activations are those that
autograd keeps of decoder layers of the Llama family, counted once with
``torch.autograd.graph.saved_tensors_hooks`` and written as formulas (`activation_bytes`;
`tests/train/test_plan.py` counts again). Symbols: d hidden and f inner width, h heads, r rank
of LoRA, L layers, V vocabulary, T tokens of a forward pass.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaConfig

from train.optimizer import parameter_groups
from train.settings import RunConfig
from vlm.model import VisionLanguageModel
from vlm.vision import num_patches, num_visual_tokens

_CONTEXT = 0.8e9  # of CUDA and its libraries
_LAYER = re.compile(r".*\.layers?\.\d+\.")
_LOGITS = 2**25  # at a time, see vlm.loss
_BITS = {"4bit": 4.13 / 8, "8bit": 1.0}  # bytes a weight: NF4's scales are quantised too


@dataclass(frozen=True)
class Load:
    """What one record asks for.

    Attributes:
        tokens: visual ones included.
        learnt: of them, supervised.
        pictures: a record.
    """

    tokens: int
    learnt: int
    pictures: float = 1.0


def memory_of(
    config: RunConfig, model: VisionLanguageModel, load: Load, micro: int, gpus: int
) -> dict[str, float]:
    """Bytes by part on each card, for so many records a forward pass."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(
        _bytes_of(name, p, config, model)
        for name, p in model.named_parameters()
        if not p.requires_grad
    )
    whole, cut = {"none": (1, 1), "zero2": (1, gpus)}.get(config.sharding, (gpus, gpus))
    # DeepSpeed trains in bfloat16 beside a float32 copy, which it counts to the optimiser.
    twice = config.sharding.startswith("zero") and config.precision == "bfloat16"
    each, copies = (2, 4 * trained) if twice else (4, 0)
    tokens, learnt = micro * load.tokens, micro * load.learnt
    vocabulary = model.config.text_config.vocab_size
    logits = min(learnt * vocabulary, _LOGITS) * 4
    parts = {
        "frozen weights": frozen / whole,
        "trained weights": each * trained / whole,
        "gradients": each * trained / cut,
        "optimiser": (_states(config, model) + copies) / cut,
        "averages": 4 * trained if config.ema_decay is not None else 0,
        "reduction": 4 * trained if config.sharding == "none" and gpus > 1 else 0,
        "gathered": _gathered(config, model) if whole > 1 else 0,
        "activations": activation_bytes(config, model.config, tokens, learnt),
        "vision": _vision_bytes(config, model.config, micro * load.pictures),
        "logits": 2 * logits,  # themselves, and their softmax or gradient
        "context": _CONTEXT,
    }
    return {name: size for name, size in parts.items() if size}


def activation_bytes(config: RunConfig, model: LlavaConfig, tokens: float, learnt: float) -> float:
    """What is kept of the decoder for the backward pass, and one layer's gradients in it.

    Args:
        config: of the run.
        model: whose decoder it is.
        tokens: T of a forward pass.
        learnt: of them, supervised: the last layer's MLP works on those alone.
    """
    text = model.text_config
    d, f, h = text.hidden_size, text.intermediate_size, text.num_attention_heads
    layers, each = text.num_hidden_layers, 2 if config.precision == "bfloat16" else 4
    kind = "frozen" if config.stage == "align" else "full"
    rank = 0
    if config.lora is not None:
        kind, rank = ("dropout" if config.lora.dropout else "lora"), config.lora.r
    wide, inner = _KEPT[each, kind]
    layer = wide * d + inner * f + 7 * rank * each + 4 * h + 8
    mlp_wide = {"frozen": 1, "full": 2}.get(kind, 2)
    last = (1 - learnt / tokens) * (inner * f + mlp_wide * each * d + 3 * rank * each)
    working = (2 * f + 3 * d) * each  # gradients of one layer, as what it kept is let go
    ends = 4 * (3 * d) + 8 * d // h
    if config.gradient_checkpointing:
        return tokens * (layers * each * d + layer + working + ends)
    single = kind == "full" or model.dtype == torch.float32  # which autocast makes copies of
    copies = 2 * layers * (4 * d * d + 3 * d * f) if each == 2 and single else 0
    return tokens * (layers * layer - last + working + ends) + copies


# Bytes kept a token and layer for each unit of d and of f, by bytes a number and by what is
# trained in the layer.
_KEPT = {
    (4, "frozen"): (24, 12),
    (4, "lora"): (36, 16),
    (4, "dropout"): (72, 20),
    (4, "full"): (44, 16),
    (2, "frozen"): (16, 6),
    (2, "lora"): (28, 8),
    (2, "dropout"): (52, 12),
    (2, "full"): (36, 8),
}


def _vision_bytes(config: RunConfig, model: LlavaConfig, pictures: float) -> float:
    """The tower on its way; all its layers if it is trained."""
    vision = model.vision_config
    d, f = vision.hidden_size, vision.intermediate_size
    tokens = pictures * (num_patches(vision) + 1)
    each = 2 if config.precision == "bfloat16" else 4
    kept = vision.num_hidden_layers if config.unfreeze_vision else 1
    return tokens * each * kept * (10 * d + 3 * f)


def _states(config: RunConfig, model: VisionLanguageModel) -> int:
    """Bytes of the optimiser: two float32 numbers a weight, with Muon one for its matrices."""
    groups = parameter_groups(
        model,
        learning_rate=config.learning_rate,
        weight_decay=0.0,
        projector_learning_rate=None,
        muon=config.optimizer == "muon",
    )
    return sum((4 if g["muon"] else 8) * p.numel() for g in groups for p in g["params"])


def _gathered(config: RunConfig, model: VisionLanguageModel) -> float:
    """What is whole on each card for a while: two layers, and all that is in none."""
    layers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found = _LAYER.match(name)
        layers[found.group() if found else ""] += int(_bytes_of(name, parameter, config, model))
    root = layers.pop("", 0)
    return root + 2 * max(layers.values(), default=0)


def _bytes_of(
    name: str, parameter: nn.Parameter, config: RunConfig, model: VisionLanguageModel
) -> float:
    """Of a parameter in memory: as it is stored, see `train.precision`."""
    linear = parameter.ndim == 2 and ".layers." in name and name.startswith("language_model.")
    if config.model.quantize is not None and linear and not parameter.requires_grad:
        return parameter.numel() * _BITS[config.model.quantize]
    half = config.precision == "bfloat16" and model.config.dtype != torch.float32
    return parameter.numel() * (2 if half and not parameter.requires_grad else 4)


def load_of(model: LlavaConfig, tokens: int | None, learnt: int | None) -> Load:
    """A mean record: the visual tokens and, where nothing else is said, 200 of text."""
    whole = tokens or num_visual_tokens(model) + 200
    return Load(whole, learnt or min(100, whole // 2))
