"""The shipped recipes have the numbers of the LLaVA-1.5 scripts (arXiv:2310.03744)."""

from typing import Any

import pytest

from train.config import load_config

PROCESSES = 8
COMMON: dict[str, Any] = {
    "epochs": 1,
    "schedule": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "precision": "bfloat16",
    "gradient_checkpointing": True,
    "unfreeze_vision": False,
}
# Learning rate, that of the projector, records of a step, what becomes of a picture that is
# not square, how records are grouped, template.
STAGES: dict[str, tuple[Any, ...]] = {
    "align": (1e-3, None, 256, "crop", "none", "plain"),
    "instruct-full": (2e-5, None, 128, "pad", "modality_length", "chat"),
    "instruct-lora": (2e-4, 2e-5, 128, "pad", "modality_length", "chat"),
    "instruct-qlora": (2e-4, 2e-5, 128, "pad", "modality_length", "chat"),
}


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_are_those_of_the_paper(size: str, stage: str) -> None:
    config = load_config(f"llava-1.5-{size}-{stage}")
    rate, of_projector, records, preprocessing, grouped, template = STAGES[stage]
    assert config.model_dump(include=COMMON.keys()) == COMMON
    assert (config.learning_rate, config.projector_learning_rate) == (rate, of_projector)
    assert config.batch_size * config.gradient_accumulation * PROCESSES == records
    assert config.model.preprocessing == preprocessing
    assert (config.batches.max_length, config.batches.group_by) == (2048, grouped)
    assert config.template == template
    if stage == "align":
        assert config.model.language == f"lmsys/vicuna-{size}-v1.5"
        assert config.model.vision == "openai/clip-vit-large-patch14-336"
        assert (config.model.projector, config.model.vision_feature_layer) == ("mlp2x_gelu", -2)
    else:
        assert config.model.start == load_config(f"llava-1.5-{size}-align").output
    assert config.model.quantize == ("4bit" if stage.endswith("qlora") else None)
    if stage.endswith("lora"):
        assert config.lora is not None
        assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
        assert not (config.lora.use_dora or config.lora.use_rslora)
    else:
        assert config.lora is None
