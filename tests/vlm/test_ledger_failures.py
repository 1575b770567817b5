"""Ledgers of runs that are killed, run out of disk, or meet another run."""

import fcntl
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlm.assistant import Assistant
from vlm.errors import ConfigError, RecordError
from vlm.ledger import Ledger, Summary, caption_to_ledger

NUMBER = 12


def run(model: Assistant, album: Path, out: Path, **options: Any) -> Summary:
    return caption_to_ledger(
        model, [album], out, **{"max_new_tokens": 12, "batch_size": 2, **options}
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def untimed(lines: bytes) -> list[dict[str, Any]]:
    """Whole rows without times, and without logprobs, whose last digits depend on the batch."""
    whole = [json.loads(line) for line in lines.splitlines(keepends=True) if line[-1:] == b"\n"]
    return [
        {key: row[key] for key in row if not key.endswith(("_ms", "_logprob"))} for row in whole
    ]


def captions(out: Path) -> list[tuple[str, str | None, str | None]]:
    """What a run promises; sorted, as a rerun appends what was lacking."""
    return sorted((row["path"], row["caption"], row["code"]) for row in rows(out))


CHILD = """
    import sys
    from vlm.assistant import load
    from vlm.ledger import caption_to_ledger

    folder, album, out, number = sys.argv[1:]
    count = 0

    def tell(result):
        global count
        count += 1
        print(count, flush=True)
        if count == int(number):
            sys.stdin.read()

    caption_to_ledger(
        load(folder), [album], out, batch_size=2, max_new_tokens=12, on_row=tell
    )
"""


def child(*arguments: object, script: str = CHILD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_is_taken_up_again(
    model: Assistant, folder: Path, album: Path, tmp_path: Path
) -> None:
    """Killed (SIGKILL) a few rows in, in the middle of a batch; and the rerun is killed too."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(model, album, whole)
    for number in (3, 4):
        with child(folder, album, out, number) as process:
            assert process.stdout is not None
            while process.stdout.readline() != f"{number}\n":
                assert process.poll() is None
            with pytest.raises(ConfigError, match="another process"):
                run(model, album, out)
            process.kill()
        assert process.returncode == -9
    kept = out.read_bytes()
    assert len(rows(out)) == 7
    assert run(model, album, out) == Summary(5, 0, 7)
    assert out.read_bytes().startswith(kept)
    assert captions(out) == captions(whole)


@pytest.mark.parametrize("left", [1, 5, 20, 100, -1])
def test_a_torn_last_row_is_written_anew(
    model: Assistant, album: Path, tmp_path: Path, left: int
) -> None:
    """Cut after some bytes of the last row; -1 cuts the line break alone."""
    out = tmp_path / "out.jsonl"
    run(model, album, out)
    whole = out.read_bytes()
    *first, last = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(first) + last[:left])
    assert run(model, album, out) == Summary(1, 0, NUMBER - 1)
    assert out.read_bytes().startswith(b"".join(first))
    assert untimed(out.read_bytes()) == untimed(whole)


def test_a_run_that_is_interrupted_keeps_its_rows(
    model: Assistant, album: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(model, album, out, on_row=interrupt)
        assert len(rows(out)) == number
    assert run(model, album, out).skipped == 2


# Other processes and full disks


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    holder = """
        import sys
        from vlm.ledger import Ledger

        with Ledger(sys.argv[1], {}):
            print("held", flush=True)
            sys.stdin.read()
    """
    with child(out, script=holder) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"), Ledger(out, {}):
            pass
        process.communicate("")
    assert process.returncode == 0
    with Ledger(out, {}) as ledger, out.open() as same:
        assert not ledger.has("a")
        with pytest.raises(BlockingIOError):
            fcntl.flock(same, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", ["", "file/out.jsonl", "pipe", "n" * 300])
def test_places_that_cannot_be_written_are_told(
    model: Assistant, album: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="cannot be written"):
        run(model, album, tmp_path / name)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write past `size` bytes of any file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_finished_rows_are_kept(
    model: Assistant, album: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(model, album, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    room = sum(map(len, lines[:3])) + 100
    with largest_file(room), pytest.raises(RecordError, match="finished rows are kept"):
        run(model, album, out)
    assert out.stat().st_size == room
    assert untimed(out.read_bytes()) == untimed(b"".join(lines[:3]))
    assert run(model, album, out).skipped == 3
    assert untimed(out.read_bytes()) == untimed(whole.read_bytes())
