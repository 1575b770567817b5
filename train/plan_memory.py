"""The memory of a training step by part, from configs.

Weights, gradients and optimiser states are counted to the byte. Activations are those that
autograd keeps of decoder layers of the Llama family, counted once with
``torch.autograd.graph.saved_tensors_hooks`` and written as formulas (`activation_bytes`;
`tests/train/test_plan.py` counts again). Symbols: d hidden and f inner width, h heads, r rank
of LoRA, L layers, V vocabulary, T tokens of a forward pass.
"""

from dataclasses import dataclass

from torch import nn
from transformers import LlavaConfig

from train.settings import RunConfig
from vlm.model import VisionLanguageModel
from vlm.vision import num_patches, num_visual_tokens

_CONTEXT = 0.8e9  # of CUDA and its libraries
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
    half = config.precision == "bfloat16"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(
        p.numel() * _bytes_each(name, p, config, half)
        for name, p in model.named_parameters()
        if not p.requires_grad
    )
    states = 4 if config.optimizer == "muon" else 8
    cut = {"none": (1, 1), "zero2": (1, gpus)}.get(config.sharding, (gpus, gpus))
    tokens, learnt = micro * load.tokens, micro * load.learnt
    vocabulary = model.config.text_config.vocab_size
    logits = min(learnt * vocabulary, _LOGITS) * 4
    parts = {
        "frozen weights": frozen / cut[0],
        "trained weights": 4 * trained / cut[0],
        "gradients": 4 * trained / cut[1],
        "optimiser": states * trained / cut[1],
        "averages": 4 * trained if config.ema_decay is not None else 0,
        "activations": activation_bytes(config, model.config, tokens, learnt),
        "vision": _vision_bytes(config, model.config, micro * load.pictures),
        "logits": 3 * logits,  # themselves, their float copy or softmax, and their gradient
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
    working = (4 * f + 6 * d) * each  # gradients of one layer on their way
    ends = 4 * (3 * d) + 8 * d // h
    if config.gradient_checkpointing:
        return tokens * (layers * each * d + layer + working + ends)
    copies = 0 if each == 4 else 2 * layers * (4 * d * d + 3 * d * f)  # weights cast by autocast
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


def _bytes_each(name: str, parameter: nn.Parameter, config: RunConfig, half: bool) -> float:
    linear = parameter.ndim == 2 and ".layers." in name and name.startswith("language_model.")
    if config.model.quantize is not None and linear:
        return _BITS[config.model.quantize]
    return 2 if half else 4


def load_of(model: LlavaConfig, tokens: int | None, learnt: int | None) -> Load:
    """A mean record: the visual tokens and, where nothing else is said, 200 of text."""
    whole = tokens or num_visual_tokens(model) + 200
    return Load(whole, learnt or min(100, whole // 2))
