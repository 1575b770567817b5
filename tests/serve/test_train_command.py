"""`vlm train` for several recipes in a row, and for none that is carried out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.scenes import build
from serve.cli import split_jobs
from vlm.history import read_history
from vlm.testing import tiny_language_folder, tiny_vision_folder

Run = Callable[..., Any]


@pytest.fixture
def recipes(tmp_path: Path) -> tuple[Path, Path]:
    """`align` and `instruct` on four scenes; the second starts from the first's output."""
    data = str(build(4, 0, tmp_path / "data", task="align", side=32))
    vision = str(tiny_vision_folder(tmp_path / "vision"))
    language = str(tiny_language_folder(tmp_path / "language"))
    first, second = tmp_path / "align.yaml", tmp_path / "instruct.yaml"
    common = {"data": [data], "learning_rate": 1e-3, "batch_size": 2, "max_steps": 2}
    align = {"stage": "align", "output": str(tmp_path / "align")}
    first.write_text(
        yaml.safe_dump(common | align | {"model": {"vision": vision, "language": language}})
    )
    instruct = {"stage": "instruct", "output": str(tmp_path / "instruct")}
    instruct |= {"model": {"start": str(tmp_path / "align")}, "lora": {"r": 2, "alpha": 4}}
    second.write_text(yaml.safe_dump(common | instruct))
    return first, second


def test_values_belong_to_the_recipe_before_them(run: Run) -> None:
    assert "name a recipe" in run("train", "x=1", "a").refused()
    assert split_jobs(["a", "x=1", "b.yaml", "y=2", "z=a=b"]) == [
        ("a", ["x=1"]),
        ("b.yaml", ["y=2", "z=a=b"]),
    ]


def test_a_chain_runs_both_stages(run: Run, recipes: tuple[Path, Path], tmp_path: Path) -> None:
    told = run("train", recipes[0], "max_steps=1", recipes[1])
    assert told.code == 0
    lines = told.out.splitlines()
    assert [str(tmp_path / "align"), str(tmp_path / "instruct")] == [
        line for line in lines if line.startswith(str(tmp_path)) and " " not in line
    ]
    steps = [entry["steps"] for entry in read_history(tmp_path / "instruct") if "steps" in entry]
    assert steps == [1, 2]
    again = run("train", *recipes)
    assert "another run" in again.refused()  # the first was made with max_steps=1


def test_all_recipes_are_checked_before_the_first_runs(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "lora.rank" in run("train", *recipes, "lora.rank=3").refused()
    assert not (tmp_path / "align").exists()


def test_a_dry_run_tells_all_and_does_nothing(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    told = run("train", recipes[0], "learning_rate=0.5", "--dry-run")
    assert told.code == 0 and sorted(tmp_path.rglob("*")) == before
    assert "learning_rate: 0.5" in told.out and "gradient_accumulation: 1" in told.out
    assert "records.jsonl: 4 records; the first 4 have 4 pictures" in told.out
    assert "FROZEN" in told.out and "TRAINABLE" in told.out
    assert "a card needs" in told.out and "activations" in told.out
    run("train", recipes[0])
    told = run("train", recipes[1], "--dry-run")
    assert "LORA" in told.out and not (tmp_path / "instruct").exists()


def test_a_dry_run_finds_what_is_missing(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    told = run("train", recipes[1], "--dry-run")
    assert told.code == 2 and "no such folder" in told.err and told.err.count("\n") == 1
    picture = next((tmp_path / "data" / "images").rglob("*.png"))
    picture.unlink()
    told = run("train", recipes[0], "--dry-run")
    assert told.code == 2 and picture.name in told.err and told.err.count("\n") == 1
    assert "FROZEN" in told.out  # what can be told is told all the same


def test_a_dry_run_of_a_chain_knows_what_the_first_will_make(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    told = run("train", *recipes, "--dry-run")
    assert (told.code, told.err) == (0, "") and not (tmp_path / "align").exists()
    tables = [line for line in told.out.splitlines() if "language_model" in line]
    assert ["FROZEN" in tables[0], "LORA" in tables[1]] == [True, True]


def test_all_that_is_wrong_with_all_of_them_is_told_at_once(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    """The second recipe's faults before the first one starts, a line each."""
    lines = (tmp_path / "data" / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["images"] *= 2  # two pictures for one place
    records[1]["messages"] = records[1]["messages"][:1]  # no answer
    bad, silent = tmp_path / "data" / "bad.jsonl", tmp_path / "data" / "silent.jsonl"
    bad.write_text(json.dumps(records[0]) + "\n" + lines[2] + "\n")
    silent.write_text(json.dumps(records[1]) + "\n" + lines[2] + "\n")
    values = (f"data=[{bad},{silent},{tmp_path / 'absent.jsonl'}]", "liger=true")
    told = run("train", *recipes, *values)
    assert told.code == 2 and told.out == ""
    told_of = ["absent.jsonl", "2 images but 1", "CUDA", "has no answer"]
    assert told.err.count("\n") == 4
    for text in told_of:
        assert sum(text in line for line in told.err.splitlines()) == 1, text
    assert not (tmp_path / "align").exists()


def test_weights_that_are_missing_are_told_before_the_first_starts(
    run: Run, recipes: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "language" / "model.safetensors").unlink()
    assert "no model.safetensors" in run("train", *recipes).refused()
    assert not (tmp_path / "align").exists()


def test_a_start_that_a_shipped_recipe_makes_is_named(run: Run) -> None:
    told = run("train", "llava-1.5-7b-instruct-lora", "--dry-run")
    assert told.code == 2
    assert "no such folder yet; `vlm train llava-1.5-7b-align` makes it" in told.err
