"""Ways to train: what each touches, and that a result is what was trained."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from train.collate import DialogueCollator
from train.config import load_config
from train.dataset import RecordDataset
from train.jobs import JOBS
from train.run import run
from train.stages import STAGES, apply_stage
from train.survey import Limits, survey
from vlm import testing
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import ConfigError
from vlm.history import read_history
from vlm.images import load_image
from vlm.messages import assistant, user
from vlm.model import VisionLanguageModel
from vlm.processor import Processor

Scenes = Callable[..., str]
Recipe = Callable[..., str]
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture
def train(
    recipe: Recipe, scenes: Scenes, llava: str, parts: dict[str, str], tmp_path: Path
) -> Callable[..., Path]:
    """Runs a few steps and returns the folder."""

    def go(stage: str = "instruct", **values: Any) -> Path:
        model = {"start": llava} if stage == "instruct" else dict(parts)
        model |= values.pop("model", {})
        defaults = {"max_steps": 3, "warmup_steps": 0, "log_steps": 1}
        data = scenes("instruct" if stage == "instruct" else "align")
        return run(
            recipe(tmp_path / "out", stage=stage, data=[data], model=model, **(defaults | values))
        )

    return go


def tower_hash(model: VisionLanguageModel) -> str:
    digest = hashlib.sha256()
    for tensor in model.vision_tower.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def logits(folder: str | Path, data: str, size: int = 3) -> torch.Tensor:
    model, processor = load_checkpoint(folder)
    records = RecordDataset([data])
    batch = DialogueCollator(processor)([records[i] for i in range(size)])
    batch.pop("labels")
    with torch.no_grad():
        found: torch.Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_lora_touches_the_named_modules_and_merges(
    train: Callable[..., Path], scenes: Scenes, llava: str, kind: dict[str, bool]
) -> None:
    out = train(lora=LORA | kind)
    before, _ = load_checkpoint(llava)
    after, _ = load_checkpoint(out)
    old = dict(before.named_parameters())
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, old[name])}
    decoder = before.language_model.get_decoder()
    linear = {
        f"language_model.model.{name}.weight"
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    projector = {name for name in old if name.startswith("multi_modal_projector")}
    assert changed == linear | projector
    assert tower_hash(after) == tower_hash(before)
    told = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert all(told[key] for key in kind)
    merged, adapted = (logits(f, scenes("instruct")) for f in (out, out / "adapter"))
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert (merged - logits(llava, scenes("instruct"))).abs().max() > 1e-3


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_lora_over_few_bits_trains_and_merges_into_whole_weights(
    bits: str, train: Callable[..., Path], scenes: Scenes, tmp_path: Path
) -> None:
    start = testing.tiny_llava_folder(tmp_path / "start", width=64)
    out = train(model={"start": str(start), "quantize": bits}, lora=LORA, learning_rate=1e-2)
    history = json.loads((out / "history.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    merged, adapted = (logits(f, scenes("instruct")) for f in (out, out / "adapter"))
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=0)
    assert (merged - logits(start, scenes("instruct"))).abs().max() > 1e-3
    assert [entry["stage"] for entry in read_history(out)] == ["instruct"]  # once, though merged


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_few_bits_of_a_half_precision_folder_compute_in_the_runs_own_type(
    precision: str, llava: str, tmp_path: Path, recipe: Recipe, scenes: Scenes
) -> None:
    testing.tiny_llava_folder(tmp_path / "single", width=64)
    model, processor = load_checkpoint(tmp_path / "single", dtype=torch.float16)
    save_checkpoint(model, processor, tmp_path / "half")
    parts = {"start": str(tmp_path / "half"), "quantize": "4bit"}
    config = load_config(
        recipe(
            tmp_path / "out",
            stage="instruct",
            data=[scenes("instruct")],
            model=parts,
            lora=LORA,
            precision=precision,
        )
    )
    job = JOBS["instruct"](config, RecordDataset(config.data))
    found = {m.compute_dtype for m in job.model.modules() if hasattr(m, "compute_dtype")}
    assert found == {getattr(torch, precision)}


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("layer", [-2, [1, 2]])
def test_an_unfrozen_tower_trains_what_is_read_of_it(
    tower: testing.Tower, layer: int | list[int], tmp_path: Path
) -> None:
    """Data-parallel training waits for the gradient of every parameter that asks for one."""
    model, processor = load_checkpoint(
        testing.tiny_llava_folder(tmp_path, tower=tower, layer=layer)
    )
    apply_stage(model, STAGES["instruct"], None, unfreeze_vision=True)
    row = processor.encode([user("what?", testing.draw_image()), assistant("a fish")])
    model(**processor.collate([row], labels=True)).loss.backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(n.startswith("vision_tower.") for n in frozen)
    moved = {n for n, p in model.vision_tower.named_parameters() if p.requires_grad}
    assert any("layer.0." in n or "layers.0." in n for n in moved)


def test_the_tower_is_trained_when_it_is_unfrozen(train: Callable[..., Path], llava: str) -> None:
    out = train(unfreeze_vision=True, vision_learning_rate=1e-3, lora=LORA)
    assert tower_hash(load_checkpoint(out)[0]) != tower_hash(load_checkpoint(llava)[0])
    roles = {
        p["part"]: p["role"]
        for p in json.loads((out / "vlm.json").read_text())["training"][-1]["parts"]
    }
    assert roles == {
        "vision_tower": "TRAINABLE",
        "multi_modal_projector": "TRAINABLE",
        "language_model": "LORA",
    }


def test_averages_are_those_of_the_formula(train: Callable[..., Path], tmp_path: Path) -> None:
    """Three runs of one, two and three steps give the weights that are averaged."""
    decay = 0.5
    kept = []
    for steps in (1, 2, 3):
        out = train("align", max_steps=steps, schedule="constant")
        kept.append(load_file(out / "model.safetensors")["multi_modal_projector.linear_1.weight"])
        for file in sorted(out.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    out = train("align", max_steps=3, schedule="constant", ema_decay=decay)
    mean = kept[0]
    for weight in kept[1:]:
        mean = decay * mean + (1 - decay) * weight
    found = load_file(out / "model.safetensors")["multi_modal_projector.linear_1.weight"]
    torch.testing.assert_close(found, mean, atol=1e-6, rtol=0)


def test_half_precision_is_trained_in_single_and_stored_as_it_was(
    train: Callable[..., Path], llava: str, tmp_path: Path
) -> None:
    model, processor = load_checkpoint(llava, dtype=torch.float16)
    save_checkpoint(model, processor, tmp_path / "half")
    out = train(model={"start": str(tmp_path / "half")}, lora=LORA, precision="bfloat16")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "half", out))
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    frozen = [name for name in before if "norm" in name or name.startswith("vision_tower")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    projector = [name for name in before if name.startswith("multi_modal_projector")]
    assert not any(torch.equal(before[name], after[name]) for name in projector)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_with_gradient_checkpointing_the_losses_are_the_same(
    train: Callable[..., Path], stage: str
) -> None:
    values: dict[str, Any] = {"lora": LORA} if stage == "instruct" else {}
    found = []
    for checkpointing in (False, True):
        out = train(stage, gradient_checkpointing=checkpointing, **values)
        history = json.loads((out / "history.json").read_text())
        found.append([row["loss"] for row in history if "loss" in row])
        for file in sorted(out.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_neftune_changes_training_without_packing(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha needs batches\.packing=false"):
        train(neftune_noise_alpha=5.0)
    out = train(neftune_noise_alpha=5.0, batches={"packing": False}, lora=LORA)
    model, _ = load_checkpoint(out)
    assert not model.get_input_embeddings()._forward_hooks


def test_liger_without_a_gpu_is_told(train: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"liger=true needs a CUDA GPU, .*set liger=false"):
        train(liger=True)


@pytest.fixture(scope="module")
def processor(llava: str) -> Processor:
    return load_checkpoint(llava)[1]


def test_the_plain_template_is_llavas(processor: Processor, tmp_path: Path) -> None:
    """Pictures, caption, line end; the question is dropped, the loss on the last two."""
    path = str(tmp_path / "a.png")
    testing.draw_image(seed=0).save(path)
    ids, mask = processor.plain().encode_ids([user("describe it", path), assistant("a red fish")])
    backend = processor.tokenizer.backend_tokenizer
    caption = backend.encode("a red fish\n", add_special_tokens=False).ids
    first = [processor.tokenizer.bos_token_id] if ids[0] != processor.image_token_id else []
    assert ids == [*first, *[processor.image_token_id] * processor.num_visual_tokens, *caption]
    assert mask == [False] * (len(ids) - len(caption)) + [True] * len(caption)
    chat, _ = processor.encode_ids([user("describe it", path), assistant("a red fish")])
    assert len(chat) > len(ids)


def test_an_aligned_folder_keeps_its_chat_template(
    train: Callable[..., Path], llava: str, scenes: Scenes
) -> None:
    out = train("align", template="plain")
    _, processor = load_checkpoint(out)
    assert "USER" in processor.chat_template
    data = RecordDataset([scenes("align")])
    plain = survey(data, processor.plain(), Limits(10_000, "error"))
    chat = survey(data, processor, Limits(10_000, "error"))
    assert (chat.length > plain.length).all()


def test_pictures_are_padded_with_the_mean_colour(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    """As LLaVA's expand2square: the longer side is the square's, the colour ``int(255 * mean)``."""
    out = train("align", model={"preprocessing": "pad"})
    _, processor = load_checkpoint(out)
    mean, side = processor.image_processor.image_mean, processor.image_size
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    for width, height in ((40, 24), (24, 41), (41, 24), (30, 30)):
        picture = testing.draw_image((width, height), seed=1)
        long = max(width, height)
        square = Image.new("RGB", (long, long), tuple(int(255 * value) for value in mean))
        square.paste(picture, ((long - width) // 2, (long - height) // 2))
        resized = square.resize((side, side), Image.Resampling.BICUBIC)
        got = processor.pixel_values([load_image(picture)])[0]
        levels = (got * std + torch.tensor(mean)[:, None, None]) * 255
        expected = torch.tensor(np.array(resized)).permute(2, 0, 1)
        assert (levels - expected).abs().max() < 0.01


def test_wrong_mixtures_are_told_before_anything_is_loaded(recipe: Recipe, tmp_path: Path) -> None:
    base = {"stage": "instruct", "data": ["x"], "model": {"start": "x", "quantize": "4bit"}}
    with pytest.raises(ConfigError, match=r"model\.quantize needs lora"):
        load_config(recipe(tmp_path / "a", **base))
    base = {"stage": "instruct", "data": ["x"], "model": {"start": "x"}}
    for values, text in (
        ({"vision_learning_rate": 1e-5}, "needs unfreeze_vision=true"),
        ({"template": "plain"}, "template=plain is for the stage align"),
        ({"ema_decay": 0.9, "sharding": "fsdp2"}, "ema_decay needs sharding=none"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_config(recipe(tmp_path / "b", **base, **values))
