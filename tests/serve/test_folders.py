"""vlm compose, inspect, merge: as typed, on folders that transformers wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from serve.folders import parse_layers
from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.errors import ConfigError
from vlm.lora import attach, save_adapter

Run = Callable[..., Any]


def test_compose_then_inspect_then_ask(run: Run, tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v", tower="siglip")
    text = testing.tiny_language_folder(tmp_path / "l", "qwen2", tie=True, template=None)
    out = tmp_path / "out"
    told = run("compose", "--vision", vision, "--language", text, "--out", out)
    assert told.code == 0, told.err
    assert "visual tokens: 4 a picture" in told.out and "508 left for text" in told.out
    assert "SiglipVisionModel" in told.out and "Qwen2ForCausalLM" in told.out
    assert "not for plain transformers" not in told.out
    LlavaForConditionalGeneration.from_pretrained(out)
    seen = run("inspect", out)
    assert seen.code == 0
    assert "«a grey square.</s>»" in seen.out.replace("« ", "«")
    assert "transformers: opens it as it is" in seen.out
    testing.draw_image().save(tmp_path / "a.png")
    options = ("--model", out, "--max-new-tokens", "3")
    assert run("ask", tmp_path / "a.png", "what?", *options).code == 0


def test_compose_takes_all_its_options(run: Run, tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l", "opt")
    told = run(
        *("compose", "--vision", vision, "--language", text, "-o", tmp_path / "out"),
        *("--projector", "linear", "--feature-layer", "-3,-1", "--select", "full"),
        *("--image-size", "42", "--dtype", "bfloat16"),
    )
    assert told.code == 0, told.err
    assert "not for plain transformers: LLaVA's class cannot tie" in told.out
    model, processor = load_checkpoint(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert processor.num_visual_tokens == 3 * 3 + 1
    assert model.multi_modal_projector.linear_1.in_features == 2 * 32
    assert not hasattr(model.multi_modal_projector, "linear_2")


def test_merge(run: Run, tmp_path: Path) -> None:
    model, _ = load_checkpoint(testing.tiny_llava_folder(tmp_path / "base"))
    attach(model, r=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter")
    told = run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert told.code == 0 and told.out.strip() == str(tmp_path / "out")
    merged = load_checkpoint(tmp_path / "out")[0].state_dict()
    adapted = load_checkpoint(tmp_path / "adapter")[0].state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in adapted.items())
    again = run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert again.code == 2 and "it exists already" in again.err
    plain = run("merge", tmp_path / "base", "--out", tmp_path / "more")
    assert plain.code == 2 and "nothing to merge" in plain.err


def test_inspect_reports_problems_with_code_1(run: Run, tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    told = run("inspect", folder)
    assert told.code == 1
    assert told.out.startswith("problem: ") and "not a complete safetensors file" in told.out
    missing = run("inspect", tmp_path / "nothing here")
    assert missing.code == 2 and "no such folder" in missing.err


@pytest.mark.parametrize("text", ["", "x", "-2,", "1.5"])
def test_layers_must_be_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="whole number such as -2"):
        parse_layers(text)
