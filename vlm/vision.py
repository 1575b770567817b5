"""Vision tower: pixels to patch features, without computing layers nobody reads.

Shapes: B pictures, H and W pixels, P patches, N visual tokens, Dv vision width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaConfig, PretrainedConfig, PreTrainedModel

from vlm.errors import CheckpointError


@dataclass(frozen=True)
class TowerKind:
    """How to read features off one architecture.

    Attributes:
        embed: tower and pixels (B, 3, H, W) to the states before the first layer.
        layers: path of the list of layers.
        prefix: tokens before the patches: a class token, register tokens.
    """

    embed: Callable[[Any, torch.Tensor], torch.Tensor]
    layers: str
    prefix: Callable[[PretrainedConfig], int]


VISION_TOWERS: dict[str, TowerKind] = {
    "clip_vision_model": TowerKind(
        lambda tower, pixels: tower.pre_layrnorm(tower.embeddings(pixels)),
        "encoder.layers",
        lambda config: 1,
    ),
    "siglip_vision_model": TowerKind(
        lambda tower, pixels: tower.embeddings(pixels), "encoder.layers", lambda config: 0
    ),
    "dinov2": TowerKind(
        lambda tower, pixels: tower.embeddings(pixels), "encoder.layer", lambda config: 1
    ),
    "dinov2_with_registers": TowerKind(
        lambda tower, pixels: tower.embeddings(pixels),
        "encoder.layer",
        lambda config: 1 + int(config.num_register_tokens),
    ),
}


def tower_kind(config: PretrainedConfig) -> TowerKind:
    """The entry of `VISION_TOWERS` for a tower's config.

    Raises:
        CheckpointError: the architecture is not among them.
    """
    kind = config.model_type
    if kind in VISION_TOWERS:
        return VISION_TOWERS[kind]
    if kind == "siglip2_vision_model":
        raise CheckpointError(
            "vision tower 'siglip2_vision_model' takes pictures of any shape (NaFlex); choose a "
            "SigLIP 2 of fixed resolution, such as google/siglip2-base-patch16-224"
        )
    raise CheckpointError(f"unknown vision tower {kind!r}; known: {', '.join(VISION_TOWERS)}")


def num_prefix_tokens(config: LlavaConfig) -> int:
    """Tokens that the tower puts before the patches (CLIP 1, SigLIP 0, DINOv2 1 or 5)."""
    return tower_kind(config.vision_config).prefix(config.vision_config)


def num_patches(config: PretrainedConfig) -> int:
    """Patches of one picture; pixels beyond the last whole patch are not seen."""
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise CheckpointError(
            f"image_size {size} with patch_size {patch} gives no square of patches; "
            "correct vision_config"
        )
    return (size // patch) ** 2


def num_dropped_tokens(config: LlavaConfig) -> int:
    """Leading states that are no visual tokens.

    Strategy ``"default"`` drops what is not a patch. A tower with nothing before its
    patches loses its first patch to it, as in LlavaForConditionalGeneration.

    Raises:
        CheckpointError: the strategy is unknown.
    """
    strategy = config.vision_feature_select_strategy
    dropped = {"default": num_prefix_tokens(config) or 1, "full": 0}
    if strategy not in dropped:
        raise CheckpointError(
            f"unknown vision_feature_select_strategy {strategy!r}; known: {', '.join(dropped)}"
        )
    return dropped[strategy]


def num_visual_tokens(config: LlavaConfig) -> int:
    """Visual tokens of one picture; the only place where this number is computed.

    Raises:
        CheckpointError: sizes that do not fit, or an unknown tower or strategy.
    """
    states = num_patches(config.vision_config) + num_prefix_tokens(config)
    return states - num_dropped_tokens(config)


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
    tower_kind(config.vision_config)
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
    kind = tower_kind(config.vision_config)
    depths = feature_layers(config)
    states = [kind.embed(tower, pixel_values)]
    layers = tower.get_submodule(kind.layers)
    assert isinstance(layers, nn.ModuleList)
    for layer in layers[: max(depths)]:
        states.append(layer(states[-1], None))
    drop = num_dropped_tokens(config)
    return torch.cat([states[depth][:, drop:] for depth in depths], dim=-1)


def idle_parameters(tower: nn.Module, config: LlavaConfig) -> list[nn.Parameter]:
    """Parameters that `encode_pixels` never reads: layers above the chosen ones, pooling.

    They get no gradient, and data-parallel training would wait for it.
    """
    path = tower_kind(config.vision_config).layers
    reached = max(feature_layers(config))
    idle = []
    for name, parameter in tower.named_parameters():
        is_layer = name.startswith(f"{path}.")
        if is_layer:
            used = int(name.removeprefix(f"{path}.").partition(".")[0]) < reached
        else:  # DINOv2's mask token is for its own pretraining
            used = name.startswith(("embeddings.", "pre_layrnorm.")) and "mask_token" not in name
        if not used:
            idle.append(parameter)
    return idle


def resize_tower(tower: PreTrainedModel, image_size: int) -> None:
    """Make a tower take pictures of another size, in place.

    The position embeddings are resampled once, with the tower's own bicubic rule, so that
    its config, its weights and the number of visual tokens agree afterwards.

    Raises:
        CheckpointError: not a whole patch fits.
    """
    config, embeddings = tower.config, tower.embeddings
    old = num_patches(config)
    config.image_size = image_size
    count = num_patches(config)
    prefix = tower_kind(config).prefix(config)
    positions = min(prefix, 1)  # registers have no position of their own
    if count != old:
        probe = torch.empty(1, count + positions, config.hidden_size, device="meta")
        with torch.no_grad():
            table = embeddings.interpolate_pos_encoding(probe, image_size, image_size)
        _set_positions(embeddings, table)
    embeddings.image_size = image_size


def _set_positions(embeddings: Any, table: torch.Tensor) -> None:
    """Put a table (1, positions, Dv) in place of the tower's position embeddings."""
    if hasattr(embeddings, "position_embeddings"):
        embeddings.position_embeddings = nn.Parameter(table.clone())
        return
    weight = embeddings.position_embedding.weight
    embeddings.position_embedding = nn.Embedding.from_pretrained(table[0].clone(), freeze=False)
    embeddings.position_ids = torch.arange(table.shape[1], device=weight.device)[None]
    embeddings.num_positions = table.shape[1]
    embeddings.num_patches = table.shape[1] - (hasattr(embeddings, "class_embedding"))
