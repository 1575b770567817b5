"""Vision tower: pixels to patch features, without computing layers nobody reads.

Shapes: B pictures, H and W pixels, N visual tokens, Dv vision width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoModel, CLIPVisionModel, LlavaConfig, PreTrainedModel

from vlm.errors import CheckpointError

LayerStates = Callable[[nn.Module, torch.Tensor, int], list[torch.Tensor]]


def _clip_states(tower: nn.Module, pixel_values: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """States after 0..depth layers, as `hidden_states` of a full CLIP forward would list them."""
    assert isinstance(tower, CLIPVisionModel)
    states = [tower.pre_layrnorm(tower.embeddings(pixel_values))]
    for layer in tower.encoder.layers[:depth]:
        states.append(layer(states[-1], None))
    return states


# model_type -> (how to run the first layers, tokens before the patches such as CLS)
VISION_TOWERS: dict[str, tuple[LayerStates, int]] = {"clip_vision_model": (_clip_states, 1)}


def _tower(config: LlavaConfig) -> tuple[LayerStates, int]:
    kind = config.vision_config.model_type
    if kind not in VISION_TOWERS:
        raise CheckpointError(f"unknown vision tower {kind!r}; known: {', '.join(VISION_TOWERS)}")
    return VISION_TOWERS[kind]


def num_prefix_tokens(config: LlavaConfig) -> int:
    """Tokens that the tower puts before the patches (CLIP: one, the class token)."""
    return _tower(config)[1]


def num_visual_tokens(config: LlavaConfig) -> int:
    """Visual tokens of one picture; the only place where this number is computed.

    ``(image_size // patch_size) ** 2``, plus the prefix tokens for strategy ``"full"``.

    Raises:
        CheckpointError: the sizes do not divide, or the tower or strategy is unknown.
    """
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    if size % patch:
        raise CheckpointError(
            f"image_size {size} is no multiple of patch_size {patch}; correct vision_config"
        )
    prefix = num_prefix_tokens(config)
    strategies = {"default": 0, "full": prefix}
    if config.vision_feature_select_strategy not in strategies:
        raise CheckpointError(
            f"unknown vision_feature_select_strategy {config.vision_feature_select_strategy!r}; "
            f"known: {', '.join(strategies)}"
        )
    return int((size // patch) ** 2) + strategies[config.vision_feature_select_strategy]


def feature_layers(config: LlavaConfig) -> list[int]:
    """The chosen layers as counts of layers to run: 0 is the embeddings, L the last layer.

    Raises:
        CheckpointError: a layer that the tower does not have.
    """
    chosen = config.vision_feature_layer
    depth = config.vision_config.num_hidden_layers
    wanted: Sequence[int] = [chosen] if isinstance(chosen, int) else chosen
    for index in wanted:
        if not -depth - 1 <= index <= depth:
            raise CheckpointError(
                f"vision_feature_layer {index} does not exist; the tower has {depth} layers, "
                f"so {-depth - 1} to {depth} are possible"
            )
    return [index % (depth + 1) for index in wanted]


def build_vision_tower(config: LlavaConfig) -> PreTrainedModel:
    """A tower with random weights, as `config.vision_config` describes it."""
    _tower(config)
    return AutoModel.from_config(config.vision_config)


def encode_pixels(
    tower: nn.Module, config: LlavaConfig, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Features of the chosen layers: (B, 3, H, W) -> (B, N, Dv * number of chosen layers).

    Layers above the highest chosen one are not run. Same values as taking
    `hidden_states[vision_feature_layer]` of a full forward and dropping the class token.
    """
    size = config.vision_config.image_size
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}; the tower needs "
            f"(pictures, 3, {size}, {size}); use Processor.pixel_values"
        )
    run, prefix = _tower(config)
    depths = feature_layers(config)
    states = run(tower, pixel_values, max(depths))
    drop = prefix if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[depth][:, drop:] for depth in depths], dim=-1)
