"""The composed model: vision tower, projector, language model.

Shapes: B rows, T positions, N visual tokens a picture, D language width, V vocabulary.
The processor settles all lengths; the model only scatters visual tokens.
"""

import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaModel, LlavaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from vlm.history import History
from vlm.language import build_language_model, final_logits
from vlm.loss import summed_cross_entropy
from vlm.padding import IGNORE_INDEX
from vlm.projector import build_projector
from vlm.vision import build_vision_tower, encode_pixels

# transformers 5.24 renamed the decoder's argument and its output field.
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
)


class VlmOutput(NamedTuple):
    """What `VisionLanguageModel.forward` returns; the loss comes first, as Trainer expects.

    Attributes:
        loss: scalar, with labels only.
        logits: (B, T or logits_to_keep, V); None with labels, where no full logits exist.
        past_key_values: the KV cache, with use_cache only.
    """

    # Not a ModelOutput: transformers 5.24 renames fields of this name behind our back.
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None


class VisionLanguageModel(PreTrainedModel):
    """CLIP-like tower, projector and causal language model under one roof.

    Args:
        config: a LlavaConfig.
        vision_tower: a tower with weights; by default a random one from the config.
        language_model: a language model with weights; by default a random one.
    """

    config: LlavaConfig
    config_class = LlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: LlavaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        for given in (vision_tower, language_model):
            for module in given.modules() if given is not None else ():
                module._is_hf_initialized = True  # or post_init would draw its weights anew
        self.vision_tower = vision_tower or build_vision_tower(config)
        self.multi_modal_projector = build_projector(config)
        self.language_model = language_model or build_language_model(config.text_config)
        # LlavaConfig(text_config=part.config) clears the attention choice inside the part's own
        # config; without one, a decoder would run with no causal mask and say nothing.
        for part in (self.vision_tower, self.language_model):
            if part.config._attn_implementation is None:
                chosen = self.config._attn_implementation
                usable = chosen != "sdpa" or part._supports_sdpa  # Gemma 2 caps its scores
                part.set_attn_implementation(chosen if usable else "eager")
        # Ranks that hold slices of a model must call its parts together: with this, a batch
        # without a picture calls tower and projector too.
        self.looks_always = False
        self.history: History = ()  # the runs that made the weights, as far as is known
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The projector keeps nn.Linear's own values; the parts initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's output layer."""
        return self.language_model.get_output_embeddings()

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Set training mode; a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens of pictures: (B, 3, H, W) -> (B, N, D).

        Vision layers above `vision_feature_layer` are not run.
        """
        return self.project(self.look(pixel_values))

    def look(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the tower says of pictures: (B, 3, H, W) -> (B, N, tower width)."""
        pixels = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype)
        return encode_pixels(self.vision_tower, self.config, pixels)

    def project(self, vision_features: torch.Tensor) -> torch.Tensor:
        """The tower's features to visual tokens: (B, N, tower width) -> (B, N, D)."""
        weight = self.multi_modal_projector.linear_1.weight
        return self.multi_modal_projector(vision_features.to(weight.device, weight.dtype))

    def embed(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token embeddings with visual tokens in their places: (B, T) -> (B, T, D).

        Args:
            input_ids: (B, T), `image_token_index` where a visual token belongs.
            image_features: (pictures, N, D) in the order of the pictures, or None.

        Raises:
            ValueError: places and visual tokens differ in number; both are named.
        """
        embeds = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_index
        num_places = int(places.sum())
        num_features = 0 if image_features is None else image_features.shape[:-1].numel()
        if num_places != num_features:
            raise ValueError(
                f"the prompt has {num_places} image positions but the pictures give "
                f"{num_features} visual tokens; encode prompt and pictures with one Processor"
            )
        if image_features is None or not num_features:
            return self._touch_projector(embeds)
        flat = image_features.reshape(num_features, -1).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(places.unsqueeze(-1), flat)

    def _touch_projector(self, embeds: torch.Tensor) -> torch.Tensor:
        """Tie a trained projector to a text-only batch with a zero gradient.

        Without this, ranks whose batch has no picture would leave its gradients out
        and data-parallel training would wait for them for ever.
        """
        if self.looks_always:
            return embeds
        weight = self.multi_modal_projector.linear_1.weight
        if not (self.training and weight.requires_grad and torch.is_grad_enabled()):
            return embeds
        nothing = self.multi_modal_projector(weight.new_zeros(1, weight.shape[1]))
        return embeds + 0 * nothing.sum().to(embeds.device, embeds.dtype)

    def _look_at_nothing(self, device: torch.device) -> torch.Tensor | int:
        """Zero; where `looks_always`, by way of a blank picture, at the same point as others."""
        if not self.looks_always:
            return 0
        size = self.config.vision_config.image_size
        seen = self.encode_images(torch.zeros(1, 3, size, size, device=device))
        return 0 * seen.sum()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> VlmOutput:
        """One pass over prompts or training rows.

        Args:
            input_ids: (B, T); or give `inputs_embeds`.
            inputs_embeds: (B, T, D), visual tokens already in place.
            attention_mask: (B, past + T) ones and zeros, or (B, 1, T, T) with position_ids.
            pixel_values: (pictures, 3, H, W); or give `image_features`.
            image_features: (pictures, N, D) from `encode_images`.
            vision_features: (pictures, N, tower width) from `look`, to be projected here.
            labels: (B, T), -100 where nothing is learnt; position t is predicted from t - 1.
            num_items_in_batch: supervised tokens of the whole global batch; the loss is the
                sum over this batch divided by it. By default this batch's own count.
            position_ids: (B, T); by default counted over the attention mask, so that left
                padding does not shift positions.
            past_key_values: KV cache of earlier positions.
            use_cache: return the KV cache. Default: only if one was given.
            logits_to_keep: logits of the last so many positions only; 0 is all.
            **kwargs: for the decoder, such as packing's cumulative lengths.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            if vision_features is None and pixel_values is not None and len(pixel_values):
                vision_features = self.look(pixel_values)
            if image_features is None and vision_features is not None:
                image_features = self.project(vision_features)
            nothing = self._look_at_nothing(input_ids.device) if image_features is None else 0
            inputs_embeds = self.embed(input_ids, image_features) + nothing
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        decoder = self.language_model.get_decoder()
        output = decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            **{CACHE_ARGUMENT: past_key_values},
            **kwargs,
        )
        hidden, cache = output.last_hidden_state, getattr(output, CACHE_ARGUMENT)
        if labels is not None:
            return VlmOutput(self._loss(hidden, labels, num_items_in_batch), None, cache)
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        return VlmOutput(None, self.logits(kept), cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) to logits (..., V), as the decoder's own class does it."""
        return final_logits(self.config.text_config, self.get_output_embeddings()(hidden))

    def _loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross-entropy summed over supervised positions, divided by the global count."""
        targets = labels[:, 1:].to(hidden.device)
        supervised = targets != IGNORE_INDEX
        states, wanted = hidden[:, :-1][supervised], targets[supervised]
        parameters = list(self.get_output_embeddings().parameters())
        vocabulary = self.config.text_config.vocab_size
        total = summed_cross_entropy(states, wanted, self.logits, parameters, vocabulary)
        if num_items is None:
            num_items = max(len(wanted), 1)
        elif isinstance(num_items, torch.Tensor):
            num_items = num_items.to(total.device)
        return total / num_items

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config and weights as a standard LLaVA folder (the processor saves itself)."""
        from vlm.weights import write_model  # weights needs this module's class names only here

        write_model(self, Path(save_directory), state_dict)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> "VisionLanguageModel":
        """The model of a LLaVA folder; see `vlm.checkpoint.load_checkpoint`."""
        from vlm.checkpoint import load_checkpoint

        return load_checkpoint(folder, *args, **kwargs)[0]


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each kept token counted from its row's first: (B, T) -> (B, T)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
