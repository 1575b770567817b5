"""`inspect_folder`: facts by independent counting, and every problem of a broken folder."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.inspection import inspect_folder, render_example
from vlm.lora import attach, save_adapter


def test_parts_and_facts(tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path, "qwen2", tie=True, tower="siglip", strategy="full")
    found = inspect_folder(folder)
    reference = LlavaForConditionalGeneration.from_pretrained(folder)
    assert not found.problems and found.state == "model"
    counts = {part.name: part.num_parameters for part in found.parts}
    assert counts == {
        "vision_tower": sum(p.numel() for p in reference.model.vision_tower.parameters()),
        "multi_modal_projector": 2 * (32 * 32 + 32),
        "language_model": sum(p.numel() for p in reference.model.language_model.parameters()),
    }
    assert {part.dtype for part in found.parts} == {"float32"}
    assert found.facts["visual tokens"].startswith("4 a picture")
    assert "512 positions, 508 left" in found.facts["context"]
    assert found.facts["language model"].endswith("vocabulary 270, embeddings tied")
    assert found.transformers == found.vllm == []


@pytest.mark.parametrize("template", testing.TEMPLATES.values(), ids=testing.TEMPLATES.keys())
def test_the_example_is_the_rendered_template(tmp_path: Path, template: str) -> None:
    folder = testing.tiny_llava_folder(tmp_path, template=template)
    _, processor = load_checkpoint(folder)
    pieces = render_example(processor)
    whole = "".join(piece.text for piece in pieces).replace("<image> x 4", "<image>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [("user", "<image>what is in the picture?"), ("assistant", "a grey square.")]
    texts = [{"role": role, "content": text} for role, text in chat]
    expected = tokenizer.apply_chat_template(texts, tokenize=False)
    assert whole.replace("\n", "").replace(" ", "") == expected.replace("\n", "").replace(" ", "")
    learnt = [piece.text.strip() for piece in pieces if piece.learnt]
    end = processor.end_of_turn
    assert end is not None
    assert [text.replace(" ", "") for text in learnt] == [f"agreysquare.{end}"]


def test_every_problem_is_told(tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"]["crop_size"] = {"height": 56, "width": 56}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    state = load_file(folder / "model.safetensors")
    del state["multi_modal_projector.linear_2.bias"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = inspect_folder(folder)
    assert not found.parts
    assert len(found.problems) == 3
    for problem, word in zip(
        found.problems, ("no tokenizer.json", "56x56", "linear_2.bias"), strict=True
    ):
        assert word in problem and "\n" not in problem


def test_a_wrong_config_is_one_problem(tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llava", "auto_map": {}}')
    found = inspect_folder(folder)
    assert len(found.problems) == 1 and "auto_map" in found.problems[0]


def test_an_adapter_is_inspected_with_its_base(tmp_path: Path) -> None:
    model, _ = load_checkpoint(testing.tiny_llava_folder(tmp_path / "base"))
    attach(model, r=2, alpha=4)
    save_adapter(model, tmp_path / "adapter")
    found = inspect_folder(tmp_path / "adapter")
    assert found.state == "adapter" and len(found.parts) == 3 and not found.problems
