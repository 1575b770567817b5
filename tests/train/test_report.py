"""What remains of a run besides the model."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from train.report import write_curves, write_manifest

HISTORY: list[dict[str, float]] = [
    {"step": 1, "loss": 4.0, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 0.05},
    {"step": 2, "eval_loss": 3.0},
    {"step": 2, "train_runtime": 1.5},
]


def colours(path: Path) -> set[tuple[int, ...]]:
    """The saturated colours of a picture: those of its lines."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    vivid = pixels.max(1).astype(int) - pixels.min(1) > 100
    return set(map(tuple, pixels[vivid].tolist()))


def test_curves_are_a_picture_with_a_line_for_each_loss(tmp_path: Path) -> None:
    found = {}
    for name, history in (("none", []), ("one", HISTORY[:2]), ("both", HISTORY)):
        folder = tmp_path / name
        folder.mkdir()
        write_curves(folder, "align", history)
        with Image.open(folder / "curves.png") as image:
            assert image.format == "PNG" and image.width > image.height > 300
        found[name] = colours(folder / "curves.png")
    assert not found["none"]
    assert found["one"] and found["one"] < found["both"]


def test_the_history_is_kept_as_it_is(tmp_path: Path) -> None:
    write_curves(tmp_path, "align", HISTORY)
    assert json.loads((tmp_path / "history.json").read_text()) == HISTORY


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"stage": "align", "steps": 2, "data": {"records": 8}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["python"] == platform.python_version()
    assert manifest["packages"]["torch"] == version("torch")
    assert {"transformers", "peft", "tokenizers"} < manifest["packages"].keys()
    assert (manifest["stage"], manifest["steps"]) == ("align", 2)
    assert manifest["data"] == {"records": 8}
