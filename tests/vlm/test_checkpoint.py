"""Opening, composing and writing folders: every broken one is refused with a reason."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm import testing
from vlm.checkpoint import compose, load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.messages import user
from vlm.model import VisionLanguageModel
from vlm.weights import write_shards

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return testing.tiny_llava_folder(tmp_path / "llava")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    raw = json.loads((folder / name).read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        level = raw
        for parent in parents:
            level = level[parent]
        level[key] = value
    (folder / name).write_text(json.dumps(raw))


def refused(folder: Path, *reasons: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    for reason in reasons:
        assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def same_weights(a: VisionLanguageModel, b: VisionLanguageModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "legacy": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    "in memory": lambda name: (
        name.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model", "model.language_model")
        .replace("vision_tower", "model.vision_tower")
        .replace("multi_modal", "model.multi_modal")
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_all_spellings_of_names_are_read(folder: Path, spelling: Callable[[str], str]) -> None:
    plain, _ = load_checkpoint(folder)

    def rename(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[spelling(name)] = state.pop(name)

    edit_weights(folder, rename)
    assert same_weights(load_checkpoint(folder)[0], plain)


def test_buffers_of_old_versions_are_ignored(folder: Path) -> None:
    edit_weights(
        folder,
        lambda s: s.update(
            {
                "vision_tower.vision_model.embeddings.position_ids": torch.arange(5),
                "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    load_checkpoint(folder)


def test_names_on_disk_are_the_published_layout(folder: Path, tmp_path: Path) -> None:
    save_checkpoint(*load_checkpoint(folder), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / WEIGHTS))
    assert "language_model.lm_head.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "projector_type" not in config
    assert not list((tmp_path / "out").glob("*.part"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept_or_converted(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, processor = load_checkpoint(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    save_checkpoint(model, processor, tmp_path / "out")
    again, _ = load_checkpoint(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert same_weights(model, again)
    batch = processor.collate([processor.encode([user("q", testing.draw_image())])])
    assert torch.isfinite(again(**batch).logits).all()


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_tied_embeddings_stay_tied(tmp_path: Path, language: testing.Language) -> None:
    folder = testing.tiny_llava_folder(tmp_path / "a", language, tie=True)
    model, processor = load_checkpoint(folder)
    save_checkpoint(model, processor, tmp_path / "b")
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "b" / WEIGHTS)
    again, _ = load_checkpoint(tmp_path / "b")
    for candidate in (model, again):
        words = candidate.get_input_embeddings().weight
        assert candidate.get_output_embeddings().weight is words
    assert same_weights(model, again)


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path, tie=True)
    head = "language_model.lm_head.weight"
    edit_weights(folder, lambda s: s.update({head: torch.zeros(270, 32)}))
    refused(folder, head, "tie_word_embeddings")


def test_shards_are_read_and_a_missing_one_is_named(folder: Path) -> None:
    plain, _ = load_checkpoint(folder)
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    halves = [list(state)[::2], list(state)[1::2]]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, keys in zip(names, halves, strict=True):
        save_file({k: state[k] for k in keys}, folder / name)
    mapping = {k: name for name, keys in zip(names, halves, strict=True) for k in keys}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": mapping}))
    assert same_weights(load_checkpoint(folder)[0], plain)
    (folder / names[1]).unlink()
    refused(folder, names[1], "missing")
    mapping = dict.fromkeys(state, "../x.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": mapping}))
    refused(folder, "../x.safetensors")


def test_writing_again_leaves_no_stale_shard(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    write_shards({"a": torch.ones(2)}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS]


PROJECTOR = "multi_modal_projector.linear_2.weight"


def test_wrong_weights_are_named(folder: Path) -> None:
    edit_weights(folder, lambda s: s.pop(PROJECTOR))
    refused(folder, "1 missing", PROJECTOR)
    edit_weights(folder, lambda s: s.update({PROJECTOR: torch.ones(32, 16), "x.y": torch.ones(1)}))
    refused(folder, "1 unexpected: x.y", "1 mismatched", "[32, 16] in the folder, [32, 32]")
    edit_weights(
        folder, lambda s: (s.pop("x.y"), s.update({PROJECTOR: torch.full((32, 32), torch.nan)}))
    )
    refused(folder, PROJECTOR, "NaN")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for cut in (len(data) - 1, len(data) // 2, 5, 0):
        (folder / WEIGHTS).write_bytes(data[:cut])
        refused(folder, WEIGHTS, "download it again")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10**15) + data[8:])
    refused(folder, WEIGHTS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    refused(folder, name, "pickled", "safetensors")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "llava_next"}, "unknown model_type 'llava_next'; known: llava"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"text_config__auto_map": {}}, "auto_map"),
        ({"_attn_implementation_internal": "x/y"}, "_attn_implementation_internal"),
        ({"attn_implementation": "x/y"}, "attn_implementation 'x/y' would fetch code"),
        ({"quantization_config": {}}, "quantised"),
        ({"text_config__model_type": "nonsense"}, "nonsense"),
        ({"vision_config__model_type": "vit"}, "known: clip_vision_model"),
        ({"vision_config__patch_size": 9}, "patch_size is 14 for the processor but 9"),
        ({"vision_config__image_size": 42}, "28x28 but the vision tower takes 42x42"),
        ({"vision_feature_layer": 9}, "vision_feature_layer 9"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"projector_type": "resampler"}, "known: linear, mlp"),
        ({"projector_type": "linear"}, "set projector_hidden_act to 'linear'"),
        ({"image_token_index": 5000}, "outside the vocabulary of 270"),
        ({"text_config__hidden_size": 16, "text_config__head_dim": 4}, "mismatched"),
    ],
)
def test_bad_configs_are_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit_json(folder, "config.json", **changes)
    refused(folder, reason)


def test_missing_or_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    for name in (WEIGHTS, "tokenizer.json", "processor_config.json", "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(folder, name)
        (folder / name).write_bytes(kept)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "not JSON")
    (folder / "tokenizer.json").write_text("{}")
    refused(testing.tiny_llava_folder(tmp_path / "c") and folder, "config.json")


def test_a_linear_projector_survives_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    vision = testing.tiny_vision_folder(tmp_path / "v")
    text = testing.tiny_language_folder(tmp_path / "l")
    model, processor = compose(vision, text, projector="linear")
    save_checkpoint(model, processor, tmp_path / "out")
    assert same_weights(load_checkpoint(tmp_path / "out")[0], model)
    edit_weights(tmp_path / "out", lambda s: s[PROJECTOR].add_(1))
    refused(tmp_path / "out", PROJECTOR, "not the identity")


def test_a_full_disk_leaves_the_old_file_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_checkpoint(folder)
    before = (folder / WEIGHTS).read_bytes()

    def full(_state: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.weights.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(model, processor, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_moving_a_folder_changes_nothing(folder: Path, tmp_path: Path) -> None:
    plain, _ = load_checkpoint(folder)
    moved = tmp_path / "qwen-13b-lora-mpt"  # nothing is read from a name
    shutil.copytree(folder, moved)
    assert same_weights(load_checkpoint(moved)[0], plain)
