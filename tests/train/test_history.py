"""The record of a model grows from run to run, from its parts to the instructed assistant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from train.config import load_config
from train.dataset import RecordDataset
from train.run import run
from vlm.history import History, read_history
from vlm.manifest import read_manifest, verify

Recipe = Callable[..., str]
Scenes = Callable[..., str]
SIZE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
TOWER = {**SIZE, "image_size": 64, "patch_size": 16, "text_vocab_size": 300}
DECODER = {**SIZE, "vocab_size": 300, "context_length": 256}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, scenes: Scenes
) -> dict[str, Path]:
    """The folders of all four stages, each made from those before it; and their recipes."""
    root = tmp_path_factory.mktemp("chain")

    def train(stage: str, task: str, model: dict[str, Any], **values: Any) -> Path:
        data = [scenes(task)]
        steps = {"max_steps": 2, "batch_size": 4, "log_steps": 1}
        path = recipe(root / stage, stage=stage, data=data, model=model, **steps, **values)
        return run(path)

    made = {"contrastive": train("contrastive", "phrases", {"new_vision": TOWER})}
    made["language"] = train("language", "language", {"new_language": DECODER})
    parts = {"vision": str(made["contrastive"]), "language": str(made["language"])}
    made["align"] = train("align", "align", parts, eval_data=scenes("align"))
    lora = {"r": 2, "alpha": 4, "dropout": 0.0}
    made["instruct"] = train("instruct", "instruct", {"start": str(made["align"])}, lora=lora)
    made["adapter"] = made["instruct"] / "adapter"
    return made


def stages(history: History) -> list[str]:
    return [entry["stage"] for entry in history]


def test_every_run_adds_to_what_was_before(runs: dict[str, Path]) -> None:
    whole = ["contrastive", "language", "compose", "align", "instruct"]
    assert stages(read_history(runs["contrastive"])) == whole[:1]
    assert stages(read_history(runs["language"])) == whole[1:2]
    assert stages(read_history(runs["align"])) == whole[:4]
    assert stages(read_history(runs["instruct"])) == whole
    assert read_history(runs["adapter"]) == read_history(runs["instruct"])
    assert read_history(runs["instruct"])[:4] == read_history(runs["align"])  # word for word
    parts = read_history(runs["contrastive"]) + read_history(runs["language"])
    assert read_history(runs["align"])[:2] == parts


def test_an_entry_tells_how_its_run_went(runs: dict[str, Path]) -> None:
    for stage in ("contrastive", "language", "align", "instruct"):
        entry = read_history(runs[stage])[-1]
        config = load_config(str(runs[stage] / "run.yaml"))
        data = RecordDataset(config.data)
        assert entry["data"]["sha256"] == data.fingerprint()
        assert entry["data"]["records"] == len(data)
        assert (entry["steps"], entry["num_processes"]) == (2, 1)
        assert entry["config"]["learning_rate"] == config.learning_rate
        assert entry["seconds"] > 0 and entry["losses"]["training"] > 0
        assert (entry["losses"]["held_out"] is not None) == (stage == "align")
        assert entry["versions"].keys() >= {"vlm", "torch", "transformers"}
    roles = {part["part"]: part["role"] for part in read_history(runs["instruct"])[-1]["parts"]}
    assert roles["language_model"] == "LORA" and roles["vision_tower"] == "FROZEN"


def test_all_folders_are_as_they_tell(runs: dict[str, Path]) -> None:
    hashes = set()
    for folder in runs.values():
        manifest = read_manifest(folder)
        assert manifest is not None and verify(folder) == []
        assert (manifest.model is not None) == (folder in (runs["align"], runs["instruct"]))
        hashes.add(manifest.weights_sha256)
    assert len(hashes) == len(runs)


def test_the_card_shows_all_runs(runs: dict[str, Path]) -> None:
    text = ModelCard.load(runs["instruct"] / "README.md").text
    places = [text.index(f"| {stage} |") for stage in stages(read_history(runs["instruct"]))]
    assert places == sorted(places)
    assert "untrained" not in text
    assert not (runs["contrastive"] / "README.md").exists()
