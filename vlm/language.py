"""The language model: any decoder-only LLM of the Llama or Qwen kind, and its tokenizer."""

from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlm.errors import CheckpointError

# These change the logits after the output layer; we compute logits at chosen
# positions ourselves, so a model that uses one would be silently wrong.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_language_config(config: PretrainedConfig) -> None:
    """Raise CheckpointError for a language model whose logits we would not reproduce."""
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise CheckpointError(
                f"language model {config.model_type!r} sets {name}, which is not supported; "
                "choose a Llama- or Qwen-like model"
            )


def build_language_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model with random weights.

    Raises:
        CheckpointError: transformers has no causal language model for this config.
    """
    check_language_config(config)
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise CheckpointError(
            f"text_config {config.model_type!r} is no decoder-only language model"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.json as it is, left padding, with a pad token.

    Not AutoTokenizer: for some model types it rebuilds the tokenizer by its class's
    rules, which changes custom tokenizers without a word.

    Raises:
        CheckpointError: there is none, or it has no end-of-sequence token.
    """
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json; write it once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for bad JSON
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: the tokenizer cannot be opened: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no end-of-sequence token; name it in "
            "tokenizer_config.json as eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer
