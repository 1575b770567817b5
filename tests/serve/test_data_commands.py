"""`vlm data mix`, `stats` and `preview` as people type them."""

import json
import re
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


def test_stats(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    told = run("data", "stats", data, "--model", model, "--json", file)
    assert (told.code, told.err) == (0, "")
    assert re.search(r"with pictures\W+8 ", told.out) and re.search(r"<i>\W+8 \W+100.0%", told.out)
    found = json.loads(file.read_text())
    assert (found["records"], found["with_pictures"], found["unreadable_rows"]) == (8, 8, 0)
    assert found["short_answers"]["commonest"] == {"<b>cat": 8}
    assert found["visual_tokens"] == 8 * 4
    assert "no such folder" in run("data", "stats", data, "--json", "/no/s.json").refused()

    with (data / "records.jsonl").open("a") as lines:
        lines.write("{\n")
    told = run("data", "stats", data)
    assert told.code == 1 and re.search(r"unreadable rows\W+1 ", told.out)
    assert told.err.startswith("1 row was passed over, the first: ") and "line 9" in told.err
    (data / "records.jsonl").write_text("{\n")
    assert "no record can be read: 1 rows, the first" in run("data", "stats", data).refused()


def test_preview(run: Run, data: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    words = ("data", "preview", data, "--model", model, "--num", "3", "--out", out)
    told = run(*words)
    assert (told.code, told.err, told.out) == (0, "", f"{out}\n")
    text = out.read_text()
    assert text.count("<article") == 3 and "&lt;b&gt;cat" in text and "3 of 8 records" in text
    assert run(*words, "--seed", "1").code == 0 and out.read_text() != text
    assert run(*words, "--template", "plain").code == 0
    spans = re.findall(r'<span class="t l[^>]*>([^<]*)', out.read_text().partition("<article")[2])
    assert spans[-1] == "↵\n" and "".join(spans[:6]) == "&lt;b&gt;cat"
    assert "no such folder" in run("data", "preview", data, "--out", "/no/p.html").refused()

    out.unlink()
    (data / "records.jsonl").write_text("{\n")
    assert "no record can be read" in run(*words).refused()
    assert not out.exists()
