"""4-bit and 8-bit weights: which layers, how close, and what is said when it cannot be."""

import sys
from pathlib import Path
from typing import Any, get_args

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from vlm import testing
from vlm.assistant import Assistant
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError, ConfigError, MissingExtraError
from vlm.lora import attach, save_adapter
from vlm.messages import user
from vlm.quantize import Bits, check_bits, is_quantized

LAYERS = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}
CHAT = [user("what is it?", testing.draw_image())]


@pytest.mark.parametrize("bits", get_args(Bits))
@pytest.mark.parametrize("tie", [False, True])
def test_only_the_decoders_linear_layers_change(tmp_path: Path, bits: Bits, tie: bool) -> None:
    folder = testing.tiny_llava_folder(tmp_path, "qwen2", tie=tie, width=64)  # with biases
    exact, _ = load_checkpoint(folder)
    model, _ = load_checkpoint(folder, quantize=bits)
    changed = {name for name, m in model.named_modules() if isinstance(m, LAYERS[bits])}
    linears = {
        name
        for name, m in exact.named_modules()
        if type(m) is nn.Linear and name.startswith("language_model.model.")
    }
    assert changed == linears
    assert is_quantized(model) and not is_quantized(exact)
    before = exact.state_dict()
    for name, tensor in model.named_parameters():
        if name.rpartition(".")[0] not in changed or name.endswith(".bias"):
            assert torch.equal(tensor, before[name]), name
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is words) == tie


@pytest.mark.parametrize(("bits", "levels"), [("4bit", 16), ("8bit", 255)])
def test_weights_are_near_the_originals(tmp_path: Path, bits: Bits, levels: int) -> None:
    """What a layer computes on unit vectors is its weight, so no inner format is needed."""
    folder = testing.tiny_llava_folder(tmp_path, width=64)
    name = "language_model.model.layers.0.self_attn.q_proj"
    exact = load_checkpoint(folder)[0].get_submodule(name).weight
    layer = load_checkpoint(folder, quantize=bits)[0].get_submodule(name)
    with torch.no_grad():
        got = layer(torch.eye(exact.shape[1])).T
    step = 2 * exact.abs().max() / levels
    assert 0 < (got - exact).abs().max() <= 2 * step


@pytest.mark.parametrize("bits", get_args(Bits))
def test_a_quantised_model_answers(tmp_path: Path, bits: Bits) -> None:
    folder = testing.tiny_llava_folder(tmp_path, width=64)
    assistant = Assistant(*load_checkpoint(folder, quantize=bits))
    first, second = (assistant.generate([CHAT], max_new_tokens=8)[0] for _ in range(2))
    assert first == second
    assert first.num_new_tokens == 8 or first.finish_reason == "stop"


def test_layers_of_sizes_that_no_4bit_kernel_takes_stay(tmp_path: Path) -> None:
    """With a width of 32 only the MLP's way back has 64 inputs."""
    model, _ = load_checkpoint(testing.tiny_llava_folder(tmp_path), quantize="4bit")
    changed = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) in LAYERS.values()}
    assert changed == {"down_proj"}


def test_an_adapter_stays_beside_quantised_weights(tmp_path: Path) -> None:
    base = testing.tiny_llava_folder(tmp_path / "base")
    model, _ = load_checkpoint(base)
    attach(model, r=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    save_adapter(model, tmp_path / "adapter")
    plain = Assistant(*load_checkpoint(base, quantize="8bit")).processor
    quantised, _ = load_checkpoint(tmp_path / "adapter", quantize="8bit")
    merged, processor = load_checkpoint(tmp_path / "adapter")
    assert is_quantized(quantised) and any("lora_" in name for name in quantised.state_dict())
    row = plain.encode(CHAT, add_generation_prompt=True)
    with torch.no_grad():
        got, expected = (m(**processor.collate([row])).logits for m in (quantised, merged))
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = testing.tiny_llava_folder(tmp_path / "m", width=64)
    with pytest.raises(ConfigError, match="unknown quantize '3bit'; known: 4bit, 8bit"):
        check_bits("3bit")
    model, processor = load_checkpoint(folder, quantize="4bit")
    with pytest.raises(CheckpointError, match="quantised; open it without quantize"):
        save_checkpoint(model, processor, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()

    blocked: Any = None  # what Python itself puts there for a module that must not be found
    monkeypatch.setitem(sys.modules, "bitsandbytes", blocked)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm\[quantize\]'"):
        load_checkpoint(folder, quantize="4bit")
