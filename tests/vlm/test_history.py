"""The record of runs: where it comes from, and that parts bring theirs along."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import vlm
from vlm import lora, testing
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import CheckpointError
from vlm.history import base_models, composed, read_history, stamp

REVISION = "0123456789abcdef0123456789abcdef01234567"
DOWNLOAD = {"stage": "download", "base_models": ["org/clip"], "revision": REVISION}


def record(folder: Path, *stages: str) -> Path:
    """A folder with a vlm.json that tells of these stages."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vlm.json").write_text(json.dumps({"training": [{"stage": s} for s in stages]}))
    return folder


def stages(history: Any) -> list[str]:
    return [run["stage"] for run in history]


def test_a_folder_without_a_record_has_no_runs(tmp_path: Path) -> None:
    assert read_history(tmp_path) == ()
    assert read_history(tmp_path, ({"stage": "x"},)) == ({"stage": "x"},)
    assert stages(read_history(record(tmp_path / "a", "y"), ({"stage": "x"},))) == ["y"]


def test_a_download_is_told_with_its_revision(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--org--clip" / "snapshots" / REVISION
    folder.mkdir(parents=True)
    assert read_history(folder) == (DOWNLOAD,)
    record(folder, "compose", "align")
    assert stages(read_history(folder)) == ["compose", "align", "download"]
    assert base_models(read_history(folder)) == ("org/clip",)


def test_parts_bring_their_runs_along(tmp_path: Path) -> None:
    vision = record(tmp_path / "vision", "contrastive")
    language = record(tmp_path / "language", "language")
    history = composed(vision, language, "mlp")
    assert stages(history) == ["contrastive", "language", "compose"]
    joined = history[-1]
    assert (joined["vision"], joined["language"]) == ("vision", "language")  # no whole paths
    assert joined["projector"] == "mlp" and joined["base_models"] == []
    assert composed(Path("a/vision"), language, "mlp")[-1]["vision"] == "a/vision"


def test_both_parts_of_one_folder_bring_its_runs_once(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole", "compose", "align")
    assert stages(composed(whole, whole, "mlp")) == ["compose", "align", "compose"]


def test_base_models_are_the_nearest_ones(tmp_path: Path) -> None:
    clip = tmp_path / "models--org--clip" / "snapshots" / REVISION
    words = tmp_path / "models--other--words" / "snapshots" / REVISION
    for folder in (clip, words):
        folder.mkdir(parents=True)
    history = composed(clip, words, "linear")
    assert stages(history) == ["download", "download", "compose"]
    assert (history[-1]["vision"], history[-1]["language"]) == ("org/clip", "other/words")
    assert base_models(history) == ("org/clip", "other/words")
    assert base_models((*history, {"stage": "align"})) == ("org/clip", "other/words")
    later = (*history, {"stage": "download", "base_models": ["me/mine"]}, {"stage": "instruct"})
    assert base_models(later) == ("me/mine",)
    assert base_models(()) == ()


def test_a_stamp_has_a_date_with_its_zone_and_versions() -> None:
    told = stamp()
    assert told["date"].endswith("+00:00") and len(told["date"]) == 25
    assert told["versions"]["vlm"] == vlm.__version__
    assert told["versions"]["torch"] == version("torch")


def test_saving_carries_the_runs_over_and_adds_one(tmp_path: Path) -> None:
    start = record(testing.tiny_llava_folder(tmp_path / "start"), "align")
    model, processor = load_checkpoint(start)
    assert stages(model.history) == ["align"]
    save_checkpoint(model, processor, tmp_path / "copy")
    assert stages(read_history(tmp_path / "copy")) == ["align"]
    save_checkpoint(model, processor, start, {"stage": "instruct", "steps": 3})  # over itself
    assert read_history(start) == ({"stage": "align"}, {"stage": "instruct", "steps": 3})


def test_an_adapter_brings_its_own_run(tmp_path: Path) -> None:
    start = record(testing.tiny_llava_folder(tmp_path / "start"), "align")
    model, _ = load_checkpoint(start)
    lora.attach(model, r=2, alpha=4)
    lora.save_adapter(model, tmp_path / "adapter", {"stage": "instruct"})
    save_checkpoint(*load_checkpoint(tmp_path / "adapter"), tmp_path / "merged")
    for folder in ("adapter", "merged"):
        assert stages(read_history(tmp_path / folder)) == ["align", "instruct"]
    (tmp_path / "adapter" / "vlm.json").unlink()  # of another program: the base's runs are known
    assert stages(load_checkpoint(tmp_path / "adapter")[0].history) == ["align"]


@pytest.mark.parametrize("text", ["{", "[]", '{"training": {}}', '{"training": ["x"]}', "{}"])
def test_a_malformed_record_is_told(tmp_path: Path, text: str) -> None:
    folder = testing.tiny_llava_folder(tmp_path / "x")
    (folder / "vlm.json").write_text(text)
    for read in (read_history, load_checkpoint):
        with pytest.raises(CheckpointError, match="correct or remove it") as caught:
            read(folder)
        assert str(folder / "vlm.json") in str(caught.value)
