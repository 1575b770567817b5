"""The adapter: what it touches, and that it survives saving, loading and merging."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from vlm import lora, testing
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError, ConfigError
from vlm.messages import assistant, user
from vlm.model import VisionLanguageModel

Batch = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return testing.tiny_llava_folder(tmp_path / "base")


@pytest.fixture
def batch(folder: Path) -> Batch:
    _, processor = load_checkpoint(folder)
    row = processor.encode([user("what?", testing.draw_image()), assistant("a cat")])
    return processor.collate([row], labels=True)


def trained(folder: Path, batch: Batch, **options: bool) -> VisionLanguageModel:
    """A model whose adapter and projector took a few real steps."""
    model, _ = load_checkpoint(folder)
    torch.manual_seed(0)
    lora.attach(model, r=4, alpha=8, **options)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert out is not None
    return out


def test_a_fresh_adapter_changes_nothing(folder: Path, batch: Batch) -> None:
    model, _ = load_checkpoint(folder)
    before = logits(model, batch)
    assert torch.equal(logits(lora.attach(model, r=4, alpha=8), batch), before)


def test_every_decoder_linear_is_adapted_and_nothing_else(folder: Path) -> None:
    model, _ = load_checkpoint(folder)
    linears = {
        name
        for name, module in model.language_model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    lora.attach(model, r=4, alpha=8)
    adapted = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A." in n}
    assert adapted == {f"language_model.model.{name}" for name in linears}
    free = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("multi_modal_projector.") for n in free)
    assert len(free) == 2 * len(linears) + 4


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_saved_loaded_and_merged_are_the_same(
    folder: Path, batch: Batch, tmp_path: Path, options: dict[str, bool]
) -> None:
    model = trained(folder, batch, **options)
    expected = logits(model, batch)
    plain, processor = load_checkpoint(folder)
    assert (logits(plain, batch) - expected).abs().max() > 0.01
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = lora.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(logits(loaded, batch), expected)
    merged = lora.merge(loaded)
    assert not lora.has_adapter(merged)
    assert (logits(merged, batch) - expected).abs().max() <= 1e-5
    save_checkpoint(merged, processor, tmp_path / "merged")
    reopened, _ = load_checkpoint(tmp_path / "merged")
    assert torch.equal(logits(reopened, batch), logits(merged, batch))


def test_peft_itself_opens_the_adapter(folder: Path, batch: Batch, tmp_path: Path) -> None:
    model = trained(folder, batch)
    lora.save_adapter(model, tmp_path / "adapter")
    plain, _ = load_checkpoint(folder)
    plain.multi_modal_projector.load_state_dict(model.multi_modal_projector.state_dict())
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(theirs(**inputs).logits, logits(model, batch))


def test_base_weights_stay_bit_identical(folder: Path, batch: Batch, tmp_path: Path) -> None:
    base = load_checkpoint(folder)[0].state_dict()
    model = trained(folder, batch)
    lora.save_adapter(model, tmp_path / "adapter")
    loaded = lora.load_adapter(load_checkpoint(folder)[0], tmp_path / "adapter")
    for candidate in (model, loaded):
        state = {k.replace(".base_layer", ""): v for k, v in candidate.state_dict().items()}
        for name, tensor in base.items():
            if not name.startswith("multi_modal_projector."):
                assert torch.equal(state[name], tensor), name


def test_an_adapter_of_another_model_is_refused(folder: Path, batch: Batch, tmp_path: Path) -> None:
    lora.save_adapter(trained(folder, batch), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["r"] = 8
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mismatched"):
        lora.load_adapter(load_checkpoint(folder)[0], tmp_path / "adapter")
    config["target_modules"] = "x"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another language model"):
        lora.load_adapter(load_checkpoint(folder)[0], tmp_path / "adapter")
    (tmp_path / "adapter" / "projector.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no projector\.safetensors"):
        lora.load_adapter(load_checkpoint(folder)[0], tmp_path / "adapter")


def test_misuse_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(folder)
    with pytest.raises(ConfigError, match="r=0"):
        lora.attach(model, r=0, alpha=8)
    for use in (lora.merge, lambda m: lora.save_adapter(m, tmp_path)):
        with pytest.raises(CheckpointError, match="attach first"):
            use(model)
    lora.attach(model, r=4, alpha=8)
    with pytest.raises(ConfigError, match="merge first"):
        lora.attach(model, r=4, alpha=8)
    with pytest.raises(CheckpointError, match="merge first"):
        save_checkpoint(model, processor, tmp_path / "x")
    assert not (tmp_path / "x").exists()
