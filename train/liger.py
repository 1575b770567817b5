"""Liger's fused kernels for norms, rotary positions and gated MLPs; for CUDA only."""

import torch
from transformers import PreTrainedModel

from vlm.errors import ConfigError, MissingExtraError


def apply_liger(model: PreTrainedModel) -> None:
    """Let a language model compute by Liger's kernels, in place; see `check_liger`.

    The loss stays ours, which makes no logits of a whole batch either.
    """
    check_liger(model.config.model_type)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


def check_liger(kind: str) -> None:
    """Raise unless Liger can serve a language model of this type here.

    Raises:
        ConfigError: there is no CUDA GPU, or Liger does not know the architecture.
        MissingExtraError: Liger is not installed.
    """
    if not torch.cuda.is_available():
        raise ConfigError("liger=true needs a CUDA GPU, and there is none; set liger=false")
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise MissingExtraError(
            "liger=true needs Liger's kernels, which are not installed; pip install 'vlm[liger]'"
        ) from error
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"liger=true: Liger has no kernels for {kind!r}; set liger=false")
