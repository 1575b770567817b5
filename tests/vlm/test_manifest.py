"""vlm.json: it tells what is in its folder, and verifying finds what was changed since."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm
from vlm import lora, testing, weights
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.manifest import Manifest, ModelFacts, read_manifest, verify, write_manifest

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    start = testing.tiny_llava_folder(tmp_path / "start")
    save_checkpoint(*load_checkpoint(start), tmp_path / "saved")
    return tmp_path / "saved"


def told(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_it_tells_what_the_folder_holds(folder: Path) -> None:
    model, processor = load_checkpoint(folder)
    manifest, facts = told(folder), told(folder).model
    assert facts is not None
    assert facts.num_visual_tokens == testing.NUM_VISUAL_TOKENS
    assert facts.image_size == testing.IMAGE_SIZE
    assert facts.image_token_id == processor.image_token_id
    template = (folder / "chat_template.jinja").read_bytes()
    assert facts.chat_template_sha256 == hashlib.sha256(template).hexdigest()
    assert {name: part["class"] for name, part in facts.parts.items()} == {
        "vision_tower": "CLIPVisionModel",
        "multi_modal_projector": "MlpProjector",
        "language_model": "LlamaForCausalLM",
    }
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(part["num_parameters"] for part in facts.parts.values()) == count
    assert facts.portability == []
    assert manifest.training == ()
    assert manifest.versions["vlm"] == vlm.__version__
    assert manifest.versions["torch"] == torch.__version__
    wanted = {"python", "transformers", "peft", "tokenizers", "safetensors"}
    assert wanted < manifest.versions.keys()


def test_it_is_what_was_written(tmp_path: Path) -> None:
    facts = ModelFacts(4, 28, 3, "f" * 64, {"vision_tower": {"class": "C"}}, ["no", "and no"])
    for model in (facts, None):
        manifest = Manifest({"vlm": "1"}, "0" * 64, ({"stage": "align", "steps": 2},), model)
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest
    assert "model" not in json.loads((tmp_path / "vlm.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["vlm.json"]


def test_reasons_against_transformers_are_written_down(tmp_path: Path) -> None:
    start = testing.tiny_llava_folder(tmp_path / "start", "cohere")
    save_checkpoint(*load_checkpoint(start), tmp_path / "saved")
    facts = told(tmp_path / "saved").model
    assert facts is not None and "scales or caps its logits" in facts.portability[0]
    assert verify(tmp_path / "saved") == []


def test_shards_do_not_change_the_fingerprint_and_one_weight_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_checkpoint(folder)
    monkeypatch.setattr(
        weights,
        "split_torch_state_dict_into_shards",
        lambda *args, **kwargs: huggingface_hub.split_torch_state_dict_into_shards(
            *args, max_shard_size=60_000, **kwargs
        ),
    )
    save_checkpoint(model, processor, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert told(tmp_path / "shards").weights_sha256 == told(folder).weights_sha256
    assert verify(tmp_path / "shards") == []
    with torch.no_grad():
        model.language_model.get_input_embeddings().weight[5, 5] += 1e-3
    save_checkpoint(model, processor, tmp_path / "other")
    assert told(tmp_path / "other").weights_sha256 != told(folder).weights_sha256


@pytest.mark.parametrize(
    ("language", "tie"), [("llama", False), ("llama", True), ("gpt_neox", False), ("phi3", True)]
)
def test_verifying_agrees_with_saving(tmp_path: Path, language: Any, tie: bool) -> None:
    start = testing.tiny_llava_folder(tmp_path / "start", language, tie=tie)
    save_checkpoint(*load_checkpoint(start), tmp_path / "saved")
    assert verify(tmp_path / "saved") == []
    save_checkpoint(*load_checkpoint(tmp_path / "saved"), tmp_path / "saved")  # over itself
    assert verify(tmp_path / "saved") == []


def one_weight(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(state, folder / WEIGHTS)


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER: ", "HUMAN: "))


def told_number(folder: Path) -> None:
    raw = json.loads((folder / "vlm.json").read_text())
    raw["model"]["num_visual_tokens"] = 5
    raw["model"]["parts"]["language_model"]["class"] = "OtherForCausalLM"
    del raw["model"]["parts"]["vision_tower"]
    (folder / "vlm.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "starts"),
    [
        (one_weight, ["weights_sha256: vlm.json says "]),
        (template, ["chat_template_sha256: vlm.json says "]),
        (
            told_number,
            [
                "num_visual_tokens: vlm.json says 5, the folder has 4",
                "language_model.class: vlm.json says OtherForCausalLM, the folder has Llama",
                "vision_tower.class: vlm.json says None, the folder has CLIPVisionModel",
                "vision_tower.num_parameters: vlm.json says None, the folder has 44768",
            ],
        ),
    ],
    ids=["weight", "template", "numbers"],
)
def test_verifying_finds_what_was_changed(
    folder: Path, change: Callable[[Path], None], starts: list[str]
) -> None:
    assert verify(folder) == []
    change(folder)
    problems = verify(folder)
    assert len(problems) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in problems), problems


def test_an_adapter_has_one_too(folder: Path, tmp_path: Path) -> None:
    model, _ = load_checkpoint(folder)
    lora.attach(model, r=2, alpha=4)
    lora.save_adapter(model, tmp_path / "adapter")
    assert told(tmp_path / "adapter").model is None
    assert verify(tmp_path / "adapter") == []
    state = load_file(tmp_path / "adapter" / "projector.safetensors")
    state["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(state, tmp_path / "adapter" / "projector.safetensors")
    (problem,) = verify(tmp_path / "adapter")
    assert problem.startswith("weights_sha256: ")
    (tmp_path / "adapter" / "projector.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no projector\.safetensors"):
        verify(tmp_path / "adapter")


def test_a_folder_without_one(tmp_path: Path) -> None:
    folder = testing.tiny_llava_folder(tmp_path / "x")
    assert read_manifest(folder) is None
    with pytest.raises(CheckpointError, match=r"no vlm\.json to compare with"):
        verify(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "its format is None, and this version of vlm reads 1"),
        ('{"format": 2}', "its format is 2, and this version of vlm reads 1; update vlm"),
        ('{"format": 1}', "training must be a list of objects"),
        ('{"format": 1, "training": [1]}', "training must be a list of objects"),
        ('{"format": 1, "training": []}', "versions is missing"),
        ('{"format": 1, "training": [], "model": 3}', "an object was expected and not 3"),
        ('{"format": 1, "training": [], "model": {}}', "num_visual_tokens is missing"),
        (
            '{"format": 1, "training": [], "versions": {}, "weights_sha256": 1}',
            "weights_sha256 has a wrong type, int",
        ),
    ],
)
def test_a_malformed_one_is_told(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "vlm.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path)
    assert reason in str(caught.value) and str(tmp_path / "vlm.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_parts_are_told(folder: Path) -> None:
    raw = json.loads((folder / "vlm.json").read_text())
    edit_json(folder / "vlm.json", model=raw["model"] | {"parts": {"vision_tower": 1}})
    with pytest.raises(CheckpointError, match="parts has a wrong value, 1"):
        read_manifest(folder)


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_manifest(tmp_path / "file", told(folder))
