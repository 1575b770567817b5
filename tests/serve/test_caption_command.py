"""`vlm caption` as people type it: options, exit codes, interruptions."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.testing import draw_image

COMMAND = [sys.executable, "-c", "from serve.cli import main; main()"]
Run = Callable[..., Any]


def rows(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def test_everything_at_once(run: Run, model: Path, pictures: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "out.jsonl", tmp_path / "out.csv"
    (pictures / "same.png").write_bytes((pictures / "a.png").read_bytes())
    lines = tmp_path / "rows.jsonl"
    names = ("a.png", "b.png", "same.png", "absent.png")
    given = [{"image": f"pictures/{name}", "tags": name} for name in names]
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    words = ("caption", lines, "-o", out, "--model", model, "--max-new-tokens", 6)
    options = ("--prefix", "a photo: ", "--include", "zebra", "--discourage", "photo")
    files = ("--sidecar-to", tmp_path / "texts", "--csv", table)
    told = run(*words, *options, *files)
    assert told.code == 0 and "absent.png" in told.err
    assert "3 captioned (1 of them copies), 1 failed, 0 were done before" in told.out
    assert "3 text files" in told.out and len(table.read_text().splitlines()) == 5
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == [
        *("a.txt", "b.txt", "same.txt"),
    ]
    first = rows(out)[0]
    assert first["caption"].startswith("a photo: ")
    assert (first["missing"], first["unwanted"]) == (["zebra"], ["photo"])
    assert "prefix 'a photo: '" in run(*words).refused()


def test_several_prompts(run: Run, model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ("caption", pictures / "a.png", "-o", out, "--model", model, "--max-new-tokens", 4)
    told = run(*words, "--prompt", "short=what is {name}?", "--prompt", "long=tell all")
    assert told.code == 0
    assert list(rows(out)[0]["captions"]) == ["short", "long"]
    assert rows(out)[0]["questions"]["short"] == "what is a?"
    refused = run(*words, "--prompt", "what?", "--prompt", "long=tell all").refused()
    assert "'what?' needs a key" in refused
    assert "{tags} is not known" in run(*words, "--prompt", "{tags}?").refused()
    assert "exclude each other" in run(*words, "--sidecar", "--sidecar-to", "x").refused()


def test_too_many_errors_end_with_1(run: Run, model: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (pictures / "0.png").write_text("no picture")
    told = run("caption", pictures, "-o", out, "--model", model, "--max-errors", 0)
    assert told.code == 1 and "more than max_errors 0" in told.err
    assert [row["code"] for row in rows(out)] == ["undecodable"]


def test_parts_are_merged(
    run: Run, model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    words = ("caption", pictures, "-o", out, "--model", model, "--max-new-tokens", 4)
    assert "nothing to merge" in run("caption", "--merge", "-o", out).refused()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*words).code == 0 and not out.exists()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert "--merge" in run(*words).refused()
    assert run("caption", "--merge", "-o", out).code == 0
    assert run(*words).code == 0 and len(rows(out)) == 3
    assert "only --out" in run("caption", pictures, "--merge").refused()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_an_interrupted_run_keeps_what_is_done(
    model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    album, out = tmp_path / "album", tmp_path / "out.jsonl"
    album.mkdir()
    for seed in range(200):
        draw_image(seed=seed).save(album / f"{seed:03}.png")
    words = ["caption", album, "-o", out, "--model", model, "--batch-size", 1]
    command = [*COMMAND, *map(str, words), "--max-new-tokens", "60"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert 3 <= len(rows(out)) < 200
    assert told.count("\n") == 1 and f"{out} keeps what is done" in told
