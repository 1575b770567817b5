"""`vlm train`, `vlm data` and `vlm eval` as people type them."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_recipes.scenes import build as build_scenes
from train.config import list_recipes
from vlm.messages import read_records
from vlm.testing import tiny_language_folder, tiny_vision_folder

COMMAND = [sys.executable, "-c", "from serve.cli import main; main()"]
Run = Callable[..., Any]


def test_train_tells_what_is_wrong(run: Run, tmp_path: Path) -> None:
    listed = dict(line.split(": ", 1) for line in run("train", "--list").out.splitlines())
    assert list(listed) == list_recipes() and all(listed.values())
    assert "vlm train --list" in run("train").refused()
    assert "nonsense" in run("train", "nonsense").refused()
    assert "absent.yaml" in run("train", tmp_path / "absent.yaml").refused()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "stage: align\noutput: out\ndata: [data]\nlearning_rate: 0.001\nbatch_size: 2\n"
        "model: {vision: a, language: b}\n"
    )
    assert "learning_rate" in run("train", recipe, "lerning_rate=1").refused()
    assert "batch_size" in run("train", recipe, "batch_size=many").refused()
    assert "key=value" in run("train", recipe, "batch_size").refused()


def test_train_writes_a_model_that_ask_opens(run: Run, tmp_path: Path) -> None:
    data, out, recipe = tmp_path / "data", tmp_path / "out", tmp_path / "tiny.yaml"
    run("data", "build", "scenes", "--task", "align", "--num", 4, "--out", data)
    vision = tiny_vision_folder(tmp_path / "vision")
    language = tiny_language_folder(tmp_path / "language")
    recipe.write_text(
        f"stage: align\noutput: {out}\ndata: [{data / 'records.jsonl'}]\nbatch_size: 2\n"
        f"learning_rate: 0.001\nmodel: {{vision: {vision}, language: {language}}}\n"
    )
    told = run("train", recipe, "max_steps=2")
    assert told.code == 0 and told.out.splitlines()[-1] == str(out)
    picture = next((data / "images").rglob("*.png"))
    answered = run("ask", picture, "what is it?", "--model", out, "--max-new-tokens", 4)
    assert answered.code == 0
    assert "another run" in run("train", recipe, "max_steps=3").refused()
    elsewhere = ("output=" + str(tmp_path / "elsewhere"), f"data=[{tmp_path / 'absent.jsonl'}]")
    assert "absent.jsonl" in run("train", recipe, *elsewhere).refused()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_train_tells_how_to_go_on_when_it_is_stopped(
    number: int, code: int, tmp_path: Path
) -> None:
    data, recipe = tmp_path / "data", tmp_path / "long.yaml"
    build_scenes(2, 0, data, task="language", turns=1)
    language = tiny_language_folder(tmp_path / "language")
    recipe.write_text(
        f"stage: language\noutput: {tmp_path / 'out'}\ndata: [{data / 'records.jsonl'}]\n"
        f"batch_size: 2\nlearning_rate: 0.001\nmax_steps: 100000\nmodel: {{language: {language}}}\n"
    )
    process = subprocess.Popen(
        [*COMMAND, "train", recipe], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    shown = b""
    while not re.search(rb"\b[1-9]\d*/100000", shown):  # a line of a run that is under way
        piece = process.stdout.read(1)
        assert piece, process.stderr and process.stderr.read().decode()
        shown += piece
    process.send_signal(number)
    rest = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code
    assert re.search(r"stopped at step \d+ of 100000; the same command continues$", rest.strip())
    assert list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))


def test_data_build_follows_the_seed(run: Run, tmp_path: Path) -> None:
    assert "scenes" in run("data", "list").out
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        told = run("data", "build", "scenes", "--num", 3, "--seed", 5, "--out", out)
        assert (told.code, told.out) == (0, f"{out / 'records.jsonl'}\n")
    assert (first / "records.jsonl").read_bytes() == (second / "records.jsonl").read_bytes()
    records = list(read_records(first / "records.jsonl"))
    assert len(records) == 3
    assert all(Image.open(path).size == (96, 96) for r in records for path in r.images)
    third = tmp_path / "third"
    run("data", "build", "scenes", "--num", 3, "--seed", 6, "--out", third)
    assert (first / "records.jsonl").read_bytes() != (third / "records.jsonl").read_bytes()
    refused = run("data", "build", "scens", "--out", tmp_path / "x").refused()
    assert "'scenes'" in refused and not (tmp_path / "x").exists()
    assert "num" in run("data", "build", "scenes", "--num", 0, "--out", tmp_path / "x").refused()


def test_eval_counts_every_question(run: Run, model: Path, tmp_path: Path) -> None:
    data, figures = tmp_path / "scenes", tmp_path / "figures.json"
    run("data", "build", "scenes", "--num", 4, "--split", "test", "--out", data)
    asked = [q for r in read_records(data / "records.jsonl") for q in r.meta["questions"]]
    words = ("eval", data, "--model", model, "--json", figures)
    told = run(*words)
    assert told.code == 0 and "overall" in told.out and "%" in told.out
    report = json.loads(figures.read_text())
    assert report["overall"]["n"] == len(asked) == len(report["answers"])
    assert sorted({q["kind"] for q in asked}) == [kind["kind"] for kind in report["kinds"]]
    assert report["control"] is None
    run(*words, "--shuffled")
    assert json.loads(figures.read_text())["control"] == "shuffled pictures"
    run(*words, "--blind")
    assert json.loads(figures.read_text())["control"] == "blank picture"


def test_eval_tells_what_is_wrong(run: Run, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    assert str(tmp_path) in run("eval", tmp_path, "--model", model).refused()
    data.write_text("no json\n")
    assert "records.jsonl" in run("eval", data, "--model", model).refused()
    data.write_text("")
    assert "no questions" in run("eval", tmp_path, "--model", model).refused()
    assert "--blind" in run("eval", data, "--shuffled", "--blind").refused()
    assert "no such folder" in run("eval", data, "--json", tmp_path / "x" / "y.json").refused()
