"""Every decoder and tower that is named: our numbers against their own classes'."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, BitImageProcessorPil

from vlm import testing
from vlm.assistant import Assistant
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.images import load_image
from vlm.messages import parse_messages, user
from vlm.portability import transformers_differences, vllm_differences

PICTURE = testing.draw_image((40, 30), seed=4)
QUESTIONS = [[user("the thing is?", PICTURE)], [user("and what of the rest?")]]


@pytest.mark.parametrize("language", get_args(testing.Language))
def test_logits_are_those_of_the_decoders_own_class(
    tmp_path: Path, language: testing.Language
) -> None:
    """Visual tokens by hand into the decoder as transformers alone would run it."""
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", language)
    model, processor = compose(vision, text)
    save_checkpoint(model, processor, tmp_path / "out")
    again, _ = load_checkpoint(tmp_path / "out")
    row = processor.encode(parse_messages(QUESTIONS[0]), add_generation_prompt=True)
    batch = processor.collate([row])

    decoder = AutoModelForCausalLM.from_pretrained(text)
    tower = AutoModel.from_pretrained(vision)
    one, two = model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2
    with torch.no_grad():
        states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
        visual = two(F.gelu(one(states[:, 1:])))[0]
        embeds = decoder.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == processor.image_token_id] = visual
        expected = decoder(inputs_embeds=embeds).logits
        for candidate in (model, again):
            got = candidate(**batch).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("language", get_args(testing.Language))
def test_a_batch_answers_as_one_by_one(tmp_path: Path, language: testing.Language) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", language)
    assistant = Assistant(*compose(vision, text))
    together = assistant.generate(QUESTIONS, max_new_tokens=24)
    alone = [assistant.generate([chat], max_new_tokens=24)[0] for chat in QUESTIONS]
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("language", "reason"),
    [("gemma2", "caps its logits"), ("granite", "scales"), ("cohere", "scales"), ("opt", "tie")],
)
def test_what_plain_transformers_would_change_is_said(
    tmp_path: Path, language: testing.Language, reason: str
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    model, _ = compose(vision, testing.tiny_language_folder(tmp_path / "l", language))
    assert reason in " ".join(transformers_differences(model))


def test_towers_that_others_do_not_know_are_named(tmp_path: Path) -> None:
    text = testing.tiny_language_folder(tmp_path / "l")
    for tower in get_args(testing.Tower):
        model, processor = compose(testing.tiny_vision_folder(tmp_path / tower, tower=tower), text)
        assert processor.num_visual_tokens == 4  # never a class or register token
        assert bool(vllm_differences(model)) == tower.startswith("dinov2")
        assert bool(transformers_differences(model)) == (tower == "dinov2_with_registers")


@pytest.mark.parametrize("tower", get_args(testing.Tower))
def test_another_picture_size_is_the_towers_own_interpolation(
    tmp_path: Path, tower: testing.Tower
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v", tower=tower)
    text = testing.tiny_language_folder(tmp_path / "l")
    model, processor = compose(vision, text, image_size=70)
    assert processor.num_visual_tokens == 25  # 70 // 14 squared
    save_checkpoint(model, processor, tmp_path / "out")
    again, processor = load_checkpoint(tmp_path / "out")
    pixels = processor.pixel_values([load_image(testing.draw_image((90, 80)))])
    assert pixels.shape == (1, 3, 70, 70)
    reference = AutoModel.from_pretrained(vision)
    options = {} if tower.startswith("dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True, **options).hidden_states[-2]
        expected = again.multi_modal_projector(states[:, -25:])
        torch.testing.assert_close(again.encode_images(pixels), expected, atol=1e-5, rtol=0)


def test_dinov2_takes_the_size_of_its_preprocessing(tmp_path: Path) -> None:
    """Published DINOv2 has positions for 518 pixels and preprocessing for 224."""
    vision = testing.tiny_vision_folder(tmp_path / "v", tower="dinov2")
    square = {"height": 42, "width": 42}
    BitImageProcessorPil(size={"shortest_edge": 48}, crop_size=square).save_pretrained(vision)
    model, processor = compose(vision, testing.tiny_language_folder(tmp_path / "l"))
    assert model.config.vision_config.image_size == 42
    assert processor.num_visual_tokens == 9
    assert processor.image_processor.size["shortest_edge"] == 48


def test_layers_above_the_feature_layer_are_not_run(tmp_path: Path) -> None:
    for tower, layers in (("siglip", "layers"), ("dinov2", "layer")):
        vision = testing.tiny_vision_folder(tmp_path / tower, tower=tower)
        model, _ = compose(vision, testing.tiny_language_folder(tmp_path / "l"))
        ran: list[int] = []
        for i, layer in enumerate(getattr(model.vision_tower.encoder, layers)):
            layer.register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i))
        model.encode_images(torch.zeros(1, 3, 28, 28))
        assert ran == [0, 1]


def test_a_decoder_that_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, OPTConfig

    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l")
    for config, reason in (
        (BloomConfig(vocab_size=270, hidden_size=32, n_layer=1, n_head=2), "max_position_emb"),
        (OPTConfig(hidden_size=32, word_embed_proj_dim=16), "width 16 before layers of width 32"),
    ):
        config.save_pretrained(text)
        with pytest.raises(CheckpointError, match=reason):
            compose(vision, text)
