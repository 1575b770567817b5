"""One run by several processes: the captions of one process, none lost and none doubled."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from vlm import testing
from vlm.caption_job import caption_images
from vlm.caption_ranks import is_mine, merge, part_path, parts_of, ranks_of_environment
from vlm.errors import ConfigError
from vlm.ledger_rows import open_locked

NUMBER = 24
TOKENS = 24
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]

DDP = Path(__file__).parents[2] / "train" / "launch" / "ddp.yaml"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP)]
ACCELERATE += ["--num_processes", "2", "--no_python"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def said(out: Path) -> list[tuple[str, str | None, str | None]]:
    return [(row["path"], row["caption"], row["code"]) for row in rows(out)]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twenty-four files in folders of four, two of them no pictures, two the same."""
    top = tmp_path / "album"
    for seed in range(NUMBER):
        path = top / str(seed // 4) / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        testing.draw_image(seed=seed % 22).save(path)
    (top / "1" / "05.png").write_text("no picture")
    (top / "4" / "17.png").write_bytes(b"")
    return top


@pytest.fixture
def expected(model: Any, album: Path, tmp_path: Path) -> list[tuple[str, str | None, str | None]]:
    whole = tmp_path / "whole.jsonl"
    caption_images(album, whole, model=model, max_new_tokens=TOKENS)
    assert [path for path, _, _ in said(whole)] == sorted(map(str, album.rglob("*.png")))
    return said(whole)


def words(folder: Path, album: Path, out: Path) -> list[str]:
    tokens = ("--max-new-tokens", TOKENS, "--batch-size", 2)
    return list(map(str, ("caption", album, "-o", out, "--model", folder, *tokens)))


def launch(launcher: list[str], given: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """The command by two ranks, each of which leaves its process id in ``rank-N``."""
    script = folder / "vlm"
    note = f"open({str(folder)!r} + '/rank-' + os.environ['RANK'], 'w').write(str(os.getpid()))"
    script.write_text(
        f"#!{sys.executable}\nimport os\nfrom serve.cli import main\n{note}\nmain()\n"
    )
    script.chmod(0o755)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, str(script), *given], env=env)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_workers_of_a_launcher(
    launcher: list[str], folder: Path, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second time there is nothing to do
        assert launch(launcher, words(folder, album, out), tmp_path).wait(200) == 0
        assert said(out) == expected
        assert [path.name for path in sorted(tmp_path.glob("rank-*"))] == ["rank-0", "rank-1"]
        assert parts_of(out) == []
        assert not list(tmp_path.glob("*.done")) and not list(tmp_path.glob("*.tmp"))
    assert all("index" not in row for row in rows(out))


def test_a_killed_worker_is_made_up_for(
    folder: Path, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    first = launch(TORCHRUN, words(folder, album, out), tmp_path)
    part = part_path(out, 1, 2)
    while not part.exists() or part.read_bytes().count(b"\n") < 2:
        assert first.poll() is None
        time.sleep(0.005)
    os.kill(int((tmp_path / "rank-1").read_text()), signal.SIGKILL)
    assert first.wait(200) != 0 and not out.exists()
    kept = [row for each in parts_of(out) for row in rows(each)]
    assert launch(TORCHRUN, words(folder, album, out), tmp_path).wait(200) == 0
    assert said(out) == expected and parts_of(out) == []
    merged = {row["path"]: row for row in rows(out)}
    assert all(merged[row["path"]]["total_ms"] == row["total_ms"] for row in kept)


def test_ranks_one_after_the_other(
    model: Any, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    options = {"model": model, "max_new_tokens": TOKENS}
    done = [caption_images(album, out, ranks=(rank, 3), **options) for rank in range(3)]
    assert [each.complete for each in done] == [False, False, True]
    assert sum(each.captioned + each.failed for each in done) == NUMBER
    assert said(out) == expected
    testing.draw_image(seed=99).save(album / "0" / "99.png")
    done = [caption_images(album, out, ranks=(rank, 2), **options) for rank in range(2)]
    assert sum(each.skipped for each in done) == NUMBER
    assert sum(each.captioned for each in done) == 1
    assert len(said(out)) == NUMBER + 1 and said(out)[:NUMBER] == expected


def test_parts_are_merged_by_hand(
    model: Any, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    options = {"model": model, "max_new_tokens": TOKENS}
    caption_images(album, out, ranks=(0, 2), **options)
    with pytest.raises(ConfigError, match=r"another number of ranks.*--merge"):
        caption_images(album, out, **options)
    mine = [path for path, _, _ in expected if is_mine(path, 0, 2)]
    assert 0 < len(mine) < NUMBER
    assert merge(out) == len(mine) and [path for path, _, _ in said(out)] == mine
    assert caption_images(album, out, **options).skipped == len(mine)
    assert sorted(said(out)) == sorted(expected)
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(out)


def test_ranks_that_do_not_exist_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_of_environment() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="are no rank of a number"):
        ranks_of_environment()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="RANK=2 and WORLD_SIZE=many"):
        ranks_of_environment()


def test_a_rank_that_begins_anew_after_the_merge_leaves_nothing_behind(
    folder: Path, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    """The others had all that they needed, merged, and will not come back for its part."""
    out = tmp_path / "out.jsonl"
    for rank in (0, 1):
        done = caption_images(album, out, model=folder, max_new_tokens=TOKENS, ranks=(rank, 2))
        assert done.complete == (rank == 1)
    before = out.read_bytes()
    late = caption_images(album, out, model=folder, max_new_tokens=TOKENS, ranks=(0, 2))
    assert late.complete and late.captioned == late.failed == 0
    assert said(out) == expected and out.read_bytes() == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]
    testing.draw_image(seed=99).save(album / "new.png")
    for rank in (0, 1):  # one of them has something to do, and the parts meet again
        done = caption_images(album, out, model=folder, max_new_tokens=TOKENS, ranks=(rank, 2))
    assert done.complete and len(said(out)) == len(expected) + 1
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


def test_a_rank_that_starts_while_the_others_merge_waits_for_them(
    folder: Path, album: Path, expected: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for rank in (0, 1):
        caption_images(album, out, model=folder, max_new_tokens=TOKENS, ranks=(rank, 2))
    part = part_path(out, 0, 2)
    held = open_locked(part)  # as a merge holds it

    def end_the_merge() -> None:
        time.sleep(0.5)
        part.unlink()
        held.close()

    thread = threading.Thread(target=end_the_merge)
    thread.start()
    late = caption_images(album, out, model=folder, max_new_tokens=TOKENS, ranks=(0, 2))
    thread.join()
    assert late.complete and late.captioned == late.failed == 0
    assert said(out) == expected and parts_of(out) == []
