"""The vision tower: the right layer's features, and no layer run for nothing."""

import pytest
import torch
from transformers import CLIPVisionModel, LlavaConfig, ViTConfig

from vlm import testing
from vlm.errors import CheckpointError
from vlm.vision import encode_pixels, feature_layers, num_visual_tokens


def config(**changes: object) -> LlavaConfig:
    return LlavaConfig(
        vision_config=changes.pop("vision", testing.tiny_vision_config()),
        text_config=testing.tiny_text_config(),
        **changes,
    )


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3, [-2, -1, 1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_are_the_hidden_states_of_a_full_forward(
    layer: int | list[int], strategy: str
) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(testing.tiny_vision_config()).eval()
    pixels = torch.randn(2, 3, 28, 28)
    states = tower(pixels, output_hidden_states=True).hidden_states
    chosen = [states[i] for i in ([layer] if isinstance(layer, int) else layer)]
    expected = torch.cat(chosen, dim=-1)[:, 1 if strategy == "default" else 0 :]
    setting = config(vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    features = encode_pixels(tower, setting, pixels)
    assert torch.equal(features, expected)
    assert features.shape[1] == num_visual_tokens(setting)


@pytest.mark.parametrize(("layer", "runs"), [(-1, 3), (-2, 2), (-3, 1), (0, 0), ([0, -2], 2)])
def test_higher_layers_are_never_run(layer: int | list[int], runs: int) -> None:
    tower = CLIPVisionModel(testing.tiny_vision_config()).eval()
    calls: list[int] = []
    for i, block in enumerate(tower.encoder.layers):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    encode_pixels(tower, config(vision_feature_layer=layer), torch.randn(1, 3, 28, 28))
    assert calls == list(range(runs))


def test_wrong_pixel_shapes_name_both() -> None:
    tower = CLIPVisionModel(testing.tiny_vision_config())
    with pytest.raises(ValueError, match=r"\(1, 3, 30, 30\).*28"):
        encode_pixels(tower, config(), torch.zeros(1, 3, 30, 30))


@pytest.mark.parametrize(
    ("size", "patch", "tokens"), [(336, 14, 576), (224, 16, 196), (96, 12, 64)]
)
def test_visual_tokens_of_known_towers(size: int, patch: int, tokens: int) -> None:
    vision = testing.tiny_vision_config()
    vision.image_size, vision.patch_size = size, patch
    assert num_visual_tokens(config(vision=vision)) == tokens


def test_impossible_settings_are_refused() -> None:
    vision = testing.tiny_vision_config()
    vision.patch_size = 29
    with pytest.raises(CheckpointError, match="28 with patch_size 29 gives no"):
        num_visual_tokens(config(vision=vision))
    with pytest.raises(CheckpointError, match="layer -5 does not exist; the tower has 3"):
        feature_layers(config(vision_feature_layer=-5))
    with pytest.raises(CheckpointError, match="'vit'; known: clip_vision_model"):
        num_visual_tokens(config(vision=ViTConfig()))
