"""A folder with adapter and projector opens by itself and equals its merged folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from vlm import testing
from vlm.assistant import load
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.lora import attach, save_adapter
from vlm.messages import user
from vlm.model import VisionLanguageModel

PICTURE = testing.draw_image()


@pytest.fixture
def trained(tmp_path: Path) -> VisionLanguageModel:
    """A model with an adapter that changes it, from tmp_path/base."""
    model, _ = load_checkpoint(testing.tiny_llava_folder(tmp_path / "base"))
    attach(model, r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
        model.multi_modal_projector.linear_2.bias.add_(1)
    return model.eval()


def logits(model: VisionLanguageModel, folder: Path) -> torch.Tensor:
    processor = load(folder).processor
    row = processor.encode([user("what is it?", PICTURE)], add_generation_prompt=True)
    with torch.no_grad():
        return model(**processor.collate([row])).logits


def test_adapter_folder_equals_its_merged_folder(
    tmp_path: Path, trained: VisionLanguageModel
) -> None:
    base = tmp_path / "base"
    save_adapter(trained, tmp_path / "run" / "adapter")
    expected = logits(trained, base)
    opened, processor = load_checkpoint(tmp_path / "run" / "adapter")
    save_checkpoint(opened, processor, tmp_path / "merged")
    merged, _ = load_checkpoint(tmp_path / "merged")
    assert (logits(opened, base) - expected).abs().max() <= 1e-4
    assert torch.equal(logits(merged, base), logits(opened, base))
    assert (logits(load_checkpoint(base)[0], base) - expected).abs().max() > 0.1
    assert not any(parameter.requires_grad for parameter in opened.parameters())


def test_both_folders_can_be_moved_together(
    tmp_path: Path, trained: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(trained, tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "adapter"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    monkeypatch.chdir("/")
    answer = load(tmp_path / "elsewhere" / "adapter").ask(PICTURE, "why?", max_new_tokens=4)
    assert isinstance(answer, str)


def test_an_adapter_without_its_base_is_refused(
    tmp_path: Path, trained: VisionLanguageModel
) -> None:
    adapter = tmp_path / "adapter"
    save_adapter(trained, adapter)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base: no such folder"):
        load_checkpoint(adapter)
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="does not name its base model; set base_model"):
        load_checkpoint(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no base_model_name_or_path"):
        load_checkpoint(adapter)
