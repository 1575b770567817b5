"""Folders of the original LLaVA repository: written by hand, converted, compared bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.images import load_image
from vlm.original import import_original

Make = Callable[..., Any]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"


@torch.no_grad()
def run(folder: Path) -> dict[str, torch.Tensor]:
    """Ids, pixels and logits by transformers alone."""
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(folder)
    image, words = testing.draw_image((60, 40), seed=1), [{"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": [{"type": "image"}, *words]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = dict(processor(text=prompt, images=image, return_tensors="pt"))
    return {**inputs, "logits": model.eval()(**inputs).logits}


def assert_same(folder: Path, source: Path) -> None:
    ours, theirs = run(folder), run(source)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    left, right = (load_checkpoint(each)[0].state_dict() for each in (folder, source))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(("language", "kind"), [("llama", "Llama"), ("qwen2", "Qwen")])
def test_a_whole_model(
    shop: Make, tmp_path: Path, language: testing.Language, kind: str, num_shards: int
) -> None:
    old = shop(language)
    names = {"architectures": [f"Llava{kind}ForCausalLM"], "model_type": f"llava_{kind.lower()}"}
    facts = import_original(old.whole(num_shards=num_shards, **names), tmp_path / "out")
    assert facts[0].startswith(f"language model: {language}, 2 layers of width 32, 270 tokens")
    assert_same(tmp_path / "out", old.source)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert not [key for key in text if key.startswith(("mm_", "tokenizer_", "architectures"))]
    assert load_checkpoint(tmp_path / "out")[1].tokenizer.model_max_length == 384


@pytest.mark.parametrize(
    ("said", "stored"), [("float16", torch.float32), (None, torch.float16)], ids=str
)
def test_safetensors_half_precision_and_old_buffers(
    shop: Make, tmp_path: Path, said: str | None, stored: torch.dtype
) -> None:
    old = shop()
    folder = old.folder("old", torch_dtype=said)
    state = {name: t.to(stored) for name, t in old.without("vision_tower").items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / WEIGHTS)
    import_original(folder, tmp_path / "out")
    model, _ = load_checkpoint(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    half = load_checkpoint(old.source, dtype=torch.float16)[0].state_dict()
    assert all(torch.equal(t, half[name]) for name, t in model.state_dict().items())


def test_a_linear_projector(shop: Make, tmp_path: Path) -> None:
    old = shop()
    model, processor = compose(old.tower, old.source, projector="linear")
    save_checkpoint(model, processor, tmp_path / "linear")
    state = old.without("vision_tower", "mm_projector")
    for name, tensor in model.multi_modal_projector.linear_1.state_dict().items():
        state[f"model.mm_projector.{name}"] = tensor
    folder = old.folder("old", mm_projector_type="linear")
    torch.save(state, folder / PICKLE)
    import_original(folder, tmp_path / "out")
    assert_same(tmp_path / "out", tmp_path / "linear")


def test_class_token_layer_tied_head_and_mistral(shop: Make, tmp_path: Path) -> None:
    old = shop(strategy="full", layer=-1, tie=True)
    old.state["lm_head.weight"] = old.state["model.embed_tokens.weight"]
    kind = {"architectures": ["LlavaMistralForCausalLM"], "sliding_window": None}
    features = {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}
    import_original(old.whole(**kind, **features), tmp_path / "out")
    assert_same(tmp_path / "out", old.source)
    config = load_checkpoint(tmp_path / "out")[0].config
    assert (config.text_config.model_type, config.image_seq_length) == ("mistral", 5)


def test_a_tuned_tower_replaces_the_given_one(shop: Make, tmp_path: Path) -> None:
    old = shop()
    folder = old.folder("old")
    torch.save(old.state, folder / PICKLE)
    other = testing.tiny_vision_folder(tmp_path / "other", seed=9)
    import_original(folder, tmp_path / "out", vision=other)
    assert_same(tmp_path / "out", old.source)
    import_original(old.whole("plain"), tmp_path / "standard", vision=old.source)
    assert_same(tmp_path / "standard", old.source)
    (other / WEIGHTS).unlink()
    import_original(folder, tmp_path / "again", vision=other)
    assert_same(tmp_path / "again", old.source)


def test_a_siglip_tower_has_patches_alone(shop: Make, tmp_path: Path) -> None:
    old = shop("qwen2")
    tower = testing.tiny_vision_folder(tmp_path / "siglip", tower="siglip")
    model, processor = compose(tower, old.source)
    model.multi_modal_projector.load_state_dict(
        load_checkpoint(old.source)[0].multi_modal_projector.state_dict()
    )
    save_checkpoint(model, processor, tmp_path / "composed")
    folder = old.whole(architectures=["LlavaQwenForCausalLM"])
    import_original(folder, tmp_path / "out", vision=tower)
    assert_same(tmp_path / "out", tmp_path / "composed")


def test_weights_that_share_memory_in_a_pickle(shop: Make, tmp_path: Path) -> None:
    old = shop()
    words = old.state["lm_head.weight"] = old.state["model.embed_tokens.weight"]
    import_original(old.whole(), tmp_path / "out")
    model, _ = load_checkpoint(tmp_path / "out")
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head, words) and torch.equal(embeddings, words) and head is not embeddings


def test_a_whole_pickled_clip_gives_its_tower(shop: Make, tmp_path: Path) -> None:
    old = shop()
    state = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in load_file(old.tower / WEIGHTS).items()
    }
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    torch.save(state, old.tower / PICKLE)
    (old.tower / WEIGHTS).unlink()
    import_original(old.whole(), tmp_path / "out")
    assert_same(tmp_path / "out", old.source)


@pytest.mark.parametrize("base", ["pickled", "safetensors", "standard", "original"])
def test_a_projector_of_the_first_stage(shop: Make, tmp_path: Path, base: str) -> None:
    old = shop()
    given = {"standard": lambda: old.source, "original": old.whole}
    language = given.get(base, lambda: old.language(pickled=base == "pickled"))()
    import_original(old.projector(), tmp_path / "out", language=language)
    assert_same(tmp_path / "out", old.source)


def test_a_projector_on_a_model_with_a_tuned_tower(shop: Make, tmp_path: Path) -> None:
    old = shop()
    base = old.folder("base")
    untrained = {name: torch.zeros_like(t) for name, t in old.select("mm_projector").items()}
    torch.save(old.state | untrained, base / PICKLE)
    other = testing.tiny_vision_folder(tmp_path / "other", seed=9)
    import_original(old.projector(), tmp_path / "out", language=base, vision=other)
    assert_same(tmp_path / "out", old.source)


def test_the_language_model_that_the_folder_names(shop: Make, tmp_path: Path) -> None:
    old = shop()
    quantised = {"quantization_config": {}, "_name_or_path": str(old.language())}
    import_original(old.projector(**quantised), tmp_path / "out")
    assert_same(tmp_path / "out", old.source)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
@pytest.mark.parametrize("as_pickle", [True, False], ids=["bin", "safetensors"])
def test_an_adapter_is_merged_as_peft_does(
    shop: Make, tmp_path: Path, settings: dict[str, bool], as_pickle: bool
) -> None:
    old = shop()
    leaves = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=leaves, **settings)
    folder, adapted = old.adapter(config)
    if as_pickle:
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    facts = import_original(folder, tmp_path / "out")
    assert facts[-1] == "adapter: merged into 10 weights"
    found = load_checkpoint(tmp_path / "out")[0].language_model.state_dict()
    expected = adapted.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[changed], old.state[changed])
    ours, theirs = run(tmp_path / "out"), run(old.source)
    assert not torch.equal(ours["logits"], theirs["logits"])


def test_a_vocabulary_without_the_image_token_grows(shop: Make, tmp_path: Path) -> None:
    old = shop()
    folder = old.whole()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace("<image>", "<photo>")
        (folder / name).write_text(text)
    import_original(folder, tmp_path / "out")
    model, processor = load_checkpoint(tmp_path / "out")
    assert processor.image_token_id == 270
    words, before = model.get_input_embeddings().weight, old.state["model.embed_tokens.weight"]
    assert len(words) == model.config.text_config.vocab_size == 320
    assert torch.equal(words[:270], before)
    torch.testing.assert_close(words[270:], before.mean(0).expand(50, -1))
    ours, theirs = run(tmp_path / "out"), run(old.source)
    assert torch.equal(
        ours["input_ids"], torch.where(theirs["input_ids"] == 3, 270, theirs["input_ids"])
    )
    assert torch.equal(ours["logits"][..., :270], theirs["logits"])


def test_how_the_base_generates_is_kept(shop: Make, tmp_path: Path) -> None:
    """Vicuna 1.5 samples by two values and does not say do_sample, which transformers dislikes."""
    old = shop()
    folder = old.whole()
    said = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(said))
    import_original(folder, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out")[1].eos_token_ids == {2, 5}
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (kept.temperature, kept.top_p, kept.do_sample) == (0.9, 0.6, None)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_pictures_are_padded_with_the_mean_colour(
    shop: Make, tmp_path: Path, tower: testing.Tower
) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "vision", tower=tower)
    facts = import_original(shop().whole(image_aspect_ratio="pad"), tmp_path / "out", vision=vision)
    assert "pictures: padded to a square" in facts
    plain, (_, processor) = testing.image_processor(tower), load_checkpoint(tmp_path / "out")
    for size in ((60, 40), (30, 47), (28, 28), (500, 20)):
        image = testing.draw_image(size, seed=1)
        square = Image.new("RGB", (max(size),) * 2, tuple(int(x * 255) for x in plain.image_mean))
        square.paste(image, tuple((max(size) - side) // 2 for side in size))
        expected = plain(square, return_tensors="pt")["pixel_values"]
        assert torch.equal(processor.pixel_values([load_image(image)]), expected), size
        theirs = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil").image_processor
        assert torch.equal(theirs(image, return_tensors="pt")["pixel_values"], expected), size
