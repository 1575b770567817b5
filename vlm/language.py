"""The language model: any decoder-only LLM that transformers knows, and its tokenizer.

Shapes: B rows, T positions, D width of the embeddings, V vocabulary.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlm.errors import CheckpointError

_PROBE_TOLERANCE = 1e-3  # of the largest logit; half precision stays well below


def final_logits(config: PretrainedConfig, logits: torch.Tensor) -> torch.Tensor:
    """What some decoders still do to the output layer's logits (..., V).

    Gemma 2 caps them softly, ``c * tanh(x / c)`` (Gemma Team 2024, section 2); Granite
    divides and Cohere multiplies them by a constant.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    divisor, factor = (getattr(config, name, None) for name in ("logits_scaling", "logit_scale"))
    if isinstance(divisor, int | float) and divisor != 1:
        logits = logits / divisor
    if isinstance(factor, int | float) and factor != 1:
        logits = logits * factor
    return logits


def check_language_config(config: PretrainedConfig) -> None:
    """Raise CheckpointError for a decoder that visual tokens cannot enter, or of unknown length."""
    if getattr(config, "max_position_embeddings", None) is None:
        raise CheckpointError(
            f"language model {config.model_type!r} does not say how many positions it has; "
            "choose one with max_position_embeddings in its config"
        )
    width = getattr(config, "word_embed_proj_dim", None)
    if width not in (None, config.hidden_size):
        raise CheckpointError(
            f"language model {config.model_type!r} has embeddings of width {width} before layers "
            f"of width {config.hidden_size}; visual tokens would have no place between them, "
            "choose another size of it"
        )


@torch.inference_mode()
def check_decoder(model: PreTrainedModel) -> None:
    """Compare the path that visual tokens take with the model's own, on three tokens.

    Visual tokens enter as embeddings and leave as hidden states of the bare decoder; this
    refuses an architecture that does something of its own in between.

    Raises:
        CheckpointError: the logits differ, or the decoder takes no embeddings.
    """
    vocabulary = model.config.vocab_size
    ids = torch.tensor([[1, vocabulary // 2, vocabulary - 1]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits
    try:
        embeds = model.get_input_embeddings()(ids)
        states = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        ours = final_logits(model.config, model.get_output_embeddings()(states))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"language model {model.config.model_type!r} takes no embeddings ({error}); "
            "choose a decoder-only one"
        ) from error
    error_of = (own.float() - ours.float()).abs().max()
    if error_of > _PROBE_TOLERANCE * own.float().abs().max():
        raise CheckpointError(
            f"language model {model.config.model_type!r} changes logits in a way that is not "
            "reproduced here; choose another one"
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
