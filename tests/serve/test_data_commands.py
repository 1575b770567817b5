"""`vlm data mix`, `stats` and `preview` as people type them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.testing import draw_image

Run = Callable[..., Any]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    draw_image(seed=0).save(folder / "p.png")
    with (folder / "records.jsonl").open("w") as file:
        for i in range(8):
            asked = [{"type": "image"}, {"type": "text", "text": f"what is {i}?"}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "<b>cat"}]
            row = {"id": f"r{i}", "images": ["p.png"], "messages": turns, "source": "<i>"}
            file.write(json.dumps(row) + "\n")
    return folder


def test_mix(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("sources: [{path: data, epochs: 2, filters: {max_tokens: 500}}]")
    assert "add --model DIR" in run("data", "mix", recipe, "--out", tmp_path / "out").refused()
    told = run("data", "mix", recipe, "--out", tmp_path / "out", "--model", model)
    assert (told.code, told.err) == (0, "")
    assert "8 read, 8 kept, 2.00 epochs" in told.out
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["images"] == ["../data/p.png"]

    with (data / "records.jsonl").open("a") as file:
        file.write("{\n")
    words = ("data", "mix", recipe, "--out", tmp_path / "out", "--model", model)
    assert "line 9: not JSON" in run(*words).refused()
    told = run(*words, "--skip-faults")
    assert told.code == 1 and told.out.endswith("faults.jsonl\n")
    (fault,) = (tmp_path / "out" / "faults.jsonl").read_text().splitlines()
    assert json.loads(fault)["line"] == 9
