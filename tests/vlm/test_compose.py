"""Joining parts into one model: their weights stay as they are, and what does not fit is told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.model import VisionLanguageModel

WEIGHTS = "model.safetensors"


def test_compose_keeps_the_parts_and_adds_the_image_token(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", template=None)
    model, processor = compose(vision, text)
    tower = load_file(vision / WEIGHTS)
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower.get(name, tower.get(f"vision_model.{name}"))), name
    words = load_file(text / WEIGHTS)
    for name, tensor in model.language_model.state_dict().items():
        assert torch.equal(tensor, words[name]), name
    assert processor.image_token == "<image>"
    assert "USER: " in processor.chat_template
    assert not model.training


def test_compose_grows_a_vocabulary_without_the_image_token(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l")
    tokenizer = (text / "tokenizer.json").read_text().replace("<image>", "<photo>")
    (text / "tokenizer.json").write_text(tokenizer)
    settings = json.loads((text / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = []
    (text / "tokenizer_config.json").write_text(json.dumps(settings))
    before = load_file(text / WEIGHTS)["model.embed_tokens.weight"]
    model, processor = compose(vision, text)
    words = model.get_input_embeddings().weight
    assert processor.image_token_id == len(before)
    assert model.config.text_config.vocab_size == len(words) == 320  # 270 + 1, in steps of 64
    assert torch.equal(words[: len(before)], before)
    torch.testing.assert_close(words[len(before) :], before.mean(0).expand(50, -1))
    save_checkpoint(model, processor, tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_compose_takes_the_vision_half_of_a_whole_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    text_half = CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    whole = CLIPModel(
        CLIPConfig(
            vision_config=testing.tiny_vision_config().to_dict(),
            text_config=text_half.to_dict(),
            projection_dim=32,
        )
    )
    whole.save_pretrained(tmp_path / "clip")
    testing.image_processor().save_pretrained(tmp_path / "clip")
    model, _ = compose(tmp_path / "clip", testing.tiny_language_folder(tmp_path / "l"))
    expected = whole.vision_model.state_dict()
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_compose_refuses_what_does_not_fit(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l")
    with pytest.raises(CheckpointError, match="unknown projector 'conv'; known: linear, mlp"):
        compose(vision, text, projector="conv")
    with pytest.raises(CheckpointError, match="unknown vision tower 'llama'"):
        compose(text, text)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        compose(vision, vision)
    with pytest.raises(CheckpointError, match="layer 7 does not exist"):
        compose(vision, text, vision_feature_layer=7)
    state = load_file(vision / WEIGHTS)
    state.pop(next(name for name in state if "patch_embedding" in name))
    save_file(state, vision / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing weights: .*patch_embedding"):
        compose(vision, text)


def test_compose_takes_the_parts_of_llava_folders(tmp_path: Path) -> None:
    whole, _ = load_checkpoint(testing.tiny_llava_folder(tmp_path / "whole", seed=3))
    model, _ = compose(tmp_path / "whole", tmp_path / "whole")
    for part in ("vision_tower", "language_model"):
        before = whole.get_submodule(part).state_dict()
        for name, tensor in model.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, before[name]), name
    new, old = model.multi_modal_projector.linear_1, whole.multi_modal_projector.linear_1
    assert not torch.equal(new.weight, old.weight)


def test_parts_made_by_hand_keep_their_weights(tmp_path: Path) -> None:
    config = load_checkpoint(testing.tiny_llava_folder(tmp_path / "whole"))[0].config
    tower = CLIPVisionModel(config.vision_config)
    decoder = AutoModelForCausalLM.from_config(config.text_config)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    words = decoder.get_input_embeddings().weight.clone()
    model = VisionLanguageModel(config, tower, decoder)
    assert torch.equal(model.get_input_embeddings().weight, words)
    for name, tensor in model.vision_tower.state_dict().items():
        assert torch.equal(tensor, before[name]), name
