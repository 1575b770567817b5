"""What other programs will make of a model's folder, told before they are tried."""

import torch

from vlm.language import final_logits
from vlm.model import VisionLanguageModel
from vlm.vision import num_prefix_tokens
from vlm.weight_names import WeightNames

# Towers that vLLM's LLaVA takes (vllm/model_executor/models/llava.py).
_VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")


def transformers_differences(model: VisionLanguageModel) -> list[str]:
    """Why `LlavaForConditionalGeneration` would not give this model's answers; empty if it does."""
    config = model.config
    kind = config.text_config.model_type
    reasons = []
    one = torch.ones(1, dtype=torch.float64)
    if not torch.equal(final_logits(config.text_config, one), one):
        reasons.append(f"{kind} scales or caps its logits, which LLaVA's class leaves out")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        reasons.append(f"{kind} has a bias in its output layer, which LLaVA's class lacks")
    names = WeightNames(model)
    base = f"language_model.{model.language_model.base_model_prefix}."
    tied = bool(config.text_config.tie_word_embeddings)
    if tied and names.embeddings != base + "embed_tokens.weight":
        reasons.append(f"LLaVA's class cannot tie the embeddings of {kind}, which it does not find")
    strategy = config.vision_feature_select_strategy
    if strategy == "default" and num_prefix_tokens(config) > 1:
        reasons.append("LLaVA's class would take the register tokens for visual tokens")
    return reasons


def vllm_differences(model: VisionLanguageModel) -> list[str]:
    """Why vLLM would not open this folder, as far as its source tells; it is not run here."""
    kind = model.config.vision_config.model_type
    if kind in _VLLM_TOWERS:
        return []
    return [f"its LLaVA knows no {kind} tower, only {', '.join(_VLLM_TOWERS)}"]
