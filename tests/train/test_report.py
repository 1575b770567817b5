"""What remains of a run besides the model."""

import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from train.config import load_config
from train.dataset import RecordDataset
from train.report import is_result, run_record, write_curves
from train.stages import PartReport

Recipe = Callable[..., str]
Scenes = Callable[..., str]

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


def test_the_record_says_how_it_was_made(tmp_path: Path, recipe: Recipe, scenes: Scenes) -> None:
    data = scenes("align")
    parts = {"vision": "v", "language": "l"}
    config = load_config(recipe(tmp_path / "out", stage="align", data=[data], model=parts))
    line = PartReport("vision_tower", "FROZEN", 10, 0)
    diverged = [*HISTORY, {"step": 3, "loss": math.nan}]
    record = run_record(
        config, RecordDataset([data]), [line], diverged, steps=2, num_processes=1, seconds=1.23
    )
    json.dumps(record, allow_nan=False)
    assert (record["stage"], record["steps"], record["seconds"]) == ("align", 2, 1.2)
    assert record["losses"] == {"training": 2.0, "held_out": 3.0}
    assert record["config"]["learning_rate"] == config.learning_rate
    assert record["config"].keys().isdisjoint({"stage", "data"})  # they stand beside it
    assert record["data"]["records"] == 8 and record["data"]["files"] == [data]
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["torch"] == version("torch")
    assert {"vlm", "transformers", "peft", "tokenizers"} < record["versions"].keys()


def test_a_result_is_that_of_its_recipe(tmp_path: Path, recipe: Recipe, scenes: Scenes) -> None:
    parts = {"vision": "v", "language": "l"}
    values = {"stage": "align", "data": [scenes("align")], "model": parts}
    config = load_config(recipe(tmp_path / "out", **values))
    data = RecordDataset(config.data)
    record = run_record(config, data, [], [], steps=1, num_processes=1, seconds=0)
    assert not is_result(tmp_path, config)  # no record yet
    compose = {"stage": "compose", "base_models": []}
    for training, finished in (([compose], False), ([compose, record], True)):
        (tmp_path / "vlm.json").write_text(json.dumps({"training": training}))
        assert is_result(tmp_path, config) is finished
    for change in ({"learning_rate": 0.02}, {"data": ["other.jsonl"]}):
        assert not is_result(tmp_path, load_config(recipe(tmp_path / "out", **values | change)))
