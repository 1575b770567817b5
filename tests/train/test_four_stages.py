"""From an empty folder through all four stages by the command line: in the end it looks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from data_recipes.scenes import build
from train.collate import DialogueCollator
from train.dataset import RecordDataset
from vlm.checkpoint import load_checkpoint
from vlm.history import read_history
from vlm.messages import Record
from vlm.model import VisionLanguageModel

SIDE = 64
STEPS = {"contrastive": 200, "language": 150, "align": 150, "instruct": 250}


def recipes(folder: Path) -> list[str]:
    """Close-ups of single things, and the same things in words."""
    data = {}
    for task in ("phrases", "language", "align", "instruct"):
        close = {"close_up": True} if task == "phrases" else {}
        most = 2 if task == "language" else 1
        out = folder / "data" / task
        data[task] = build(2000, 1, out, task=task, turns=2, max_objects=most, side=SIDE, **close)  # type: ignore[arg-type]
    size = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
    new_vision = {"image_size": SIDE, "patch_size": 8, "text_vocab_size": 512, **size}
    new_language = {"vocab_size": 512, "context_length": 512, **size}
    parts = {"vision": str(folder / "contrastive"), "language": str(folder / "language")}
    stages: dict[str, dict[str, Any]] = {
        "contrastive": {"data": "phrases", "model": {"new_vision": new_vision}, "batch_size": 32},
        "language": {"data": "language", "model": {"new_language": new_language}},
        "align": {"data": "align", "model": {**parts, "vision_feature_layer": -1}},
        "instruct": {
            "data": "instruct",
            "model": {"start": str(folder / "align")},
            "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        },
    }
    paths = []
    for stage, values in stages.items():
        common = {"stage": stage, "output": str(folder / stage), "max_steps": STEPS[stage]}
        settings = {"optimizer": "muon", "learning_rate": 1e-2, "warmup_steps": 5, "batch_size": 16}
        recipe = common | settings | values | {"data": [str(data[values["data"]])]}
        paths.append(str(folder / f"{stage}.yaml"))
        Path(paths[-1]).write_text(yaml.safe_dump(recipe))
    return paths


def test_the_four_stages_end_in_a_model_that_looks(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from serve.cli import main; main()", "train"]
    subprocess.run([*command, *recipes(tmp_path)], env=environment, check=True, timeout=500)
    told = [run["stage"] for run in read_history(tmp_path / "instruct") if "stage" in run]
    assert set(STEPS) <= set(told) and told[-1] == "instruct"
    model, processor = load_checkpoint(tmp_path / "instruct")
    path = build(64, 9, tmp_path / "new", turns=2, max_objects=1, side=SIDE, split="test")
    data = RecordDataset([path])
    records = [data[i] for i in range(len(data))]
    right, other = losses(model, DialogueCollator(processor), records)
    assert other > 1.1 * right


def losses(
    model: VisionLanguageModel, collate: DialogueCollator, records: list[Record]
) -> tuple[float, float]:
    """The loss of all answers, with the right pictures and with those of the next record."""
    rows = [collate.encode(record) for record in records]
    shifted = [row.pictures for row in [*rows[1:], rows[0]]]
    swapped = [replace(row, pictures=own) for row, own in zip(rows, shifted, strict=True)]
    with torch.no_grad():
        return tuple(model(**collate.collate(some)).loss.item() for some in (rows, swapped))  # type: ignore[return-value]
