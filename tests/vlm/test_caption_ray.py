"""Captioning by two Ray workers: the ledger of one process, also when a worker is killed."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.cli import main
from vlm import testing
from vlm.caption_items import Item
from vlm.caption_job import caption_images
from vlm.caption_ray import RayEngine, describe_model
from vlm.errors import ConfigError, GenerationError, ImageError

NUM = 24
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 3}
MODEL: Any = describe_model(None)
COMMAND = [sys.executable, "-c", "from serve.cli import main; main()", "caption"]


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, one of them broken and one a copy."""
    folder = tmp_path_factory.mktemp("album")
    for number in range(NUM):
        testing.draw_image((96, 96), seed=number).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes(b"no picture")
    (folder / "07.png").write_bytes((folder / "06.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One cluster for all tests: starting it takes longest."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    root = str(Path(__file__).resolve().parents[2])
    ray.init(
        num_cpus=2,
        num_gpus=1,  # so it is said
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
    )
    yield ray
    ray.shutdown()


def rows(ledger: Path) -> dict[str, tuple[Any, ...]]:
    """What each picture got; every one once."""
    found = [json.loads(line) for line in ledger.read_text().splitlines()]
    told = {r["path"]: (r.get("caption"), r.get("code"), r.get("sha256"), r["run"]) for r in found}
    assert len(told) == len(found)
    return told


@pytest.fixture(scope="module")
def expected(album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("local") / "captions.jsonl"
    caption_images(str(album), out, max_new_tokens=8)
    found = rows(out)
    assert len(found) == NUM and sum(each[1] is not None for each in found.values()) == 1
    return found


def main_code(words: list[str]) -> Any:
    """What the command ends with, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["vlm", "caption", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code


def by_ray(album: Any, out: Path, **more: Any) -> Any:
    engine = RayEngine(None, 2, {"device": "cpu"})
    return caption_images(album, out, model=MODEL, **{**OPTIONS, "engine": engine, **more})


def test_two_workers_write_the_ledger_of_one_process(
    ray: Any, album: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    summary = by_ray(album, tmp_path / "captions.jsonl")
    found = rows(tmp_path / "captions.jsonl")
    assert found == expected and list(found) == list(expected)
    assert (summary.captioned, summary.failed) == (NUM - 1, 1)
    again = by_ray(album, tmp_path / "captions.jsonl")
    assert again.skipped == NUM and again.captioned == 0
    local = caption_images(str(album), tmp_path / "captions.jsonl", max_new_tokens=8)
    assert local.skipped == NUM  # the same run, whoever goes on with it


def test_pictures_without_a_file_and_copies(ray: Any, album: Path, tmp_path: Path) -> None:
    data = (album / "01.png").read_bytes()
    torn = Item("shard.tar#9", error=ImageError("the shard ends here", "truncated"))
    source = [data, torn, album / "02.png", testing.draw_image(seed=3), data]
    caption_images(source, tmp_path / "local.jsonl", max_new_tokens=8)
    engine = RayEngine(None, 1, {"device": "cpu"})
    summary = by_ray(source, tmp_path / "ray.jsonl", engine=engine, batch_size=1)
    assert rows(tmp_path / "ray.jsonl") == rows(tmp_path / "local.jsonl")
    assert (summary.captioned, summary.failed, summary.copied) == (4, 1, 1)


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of a driver's cluster that hold the model."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_one(out: Path, killed: list[int]) -> None:
    """Kill a worker of this process once there is a row."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not killed:
        for process in workers_of(os.getpid())[:1]:
            if out.exists() and out.stat().st_size:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
        time.sleep(0.01)


@pytest.mark.parametrize("tries", [3, 0])
def test_a_worker_that_is_killed_loses_and_doubles_nothing(
    ray: Any,
    album: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    tries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlm.caption_ray._TRIES", tries)
    out = tmp_path / "captions.jsonl"
    killed: list[int] = []
    thread = threading.Thread(target=kill_one, args=(out, killed))
    thread.start()
    ends = pytest.raises(GenerationError, match=r"died 1 times.*run the same command again")
    engine = RayEngine(None, 2 if tries else 1, {"device": "cpu"})
    with contextlib.nullcontext() if tries else ends:
        by_ray(album, out, batch_size=1, engine=engine)
    thread.join()
    if tries == 0:
        assert 0 < len(rows(out)) < NUM
        caption_images(album, out, max_new_tokens=8)
    assert killed and rows(out) == expected


def test_a_command_that_is_killed_or_ended_goes_on(tmp_path: Path) -> None:
    """The second run goes on with the first one's ledger; workers end with their command."""
    album = tmp_path / "album"
    album.mkdir()
    for number in range(200):
        testing.draw_image((96, 96), seed=number).save(album / f"{number:03}.png")
    out = tmp_path / "captions.jsonl"
    given = [str(album), "-o", str(out), "--max-new-tokens", "8", "--batch-size", "2"]
    command = [*COMMAND, *given, "--engine", "ray", "--workers", "1"]
    done = 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command)
        while not out.exists() or out.read_bytes().count(b"\n") <= done:
            assert process.poll() is None
            time.sleep(0.01)
        workers = workers_of(process.pid)
        process.send_signal(number)
        assert process.wait(100) == code
        assert workers and not psutil.wait_procs(workers, timeout=60)[1]
        done = out.read_bytes().count(b"\n")
        assert done < 200
    assert main_code(given) == 0  # one process may go on with it as well
    caption_images(album, tmp_path / "local.jsonl", max_new_tokens=8)
    assert rows(out) == rows(tmp_path / "local.jsonl")


def test_an_error_of_opening_is_no_death_of_a_worker(ray: Any, album: Path, tmp_path: Path) -> None:
    engine = RayEngine(None, 1, {"device": "cpu", "dtype": "float3"})
    with pytest.raises(ConfigError, match="float3"):
        by_ray(album, tmp_path / "captions.jsonl", engine=engine)


def test_workers_that_do_not_fit_the_cluster_are_told(
    ray: Any, album: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="2 workers need a GPU each, and Ray has 1"):
        by_ray(album, tmp_path / "captions.jsonl", engine=RayEngine(None, 2))
    engine = RayEngine(None, 1, {"device": "cuda:1"})
    with pytest.raises(ConfigError, match="device cuda:1: Ray gives each worker a GPU"):
        by_ray(album, tmp_path / "captions.jsonl", engine=engine)


def test_what_ray_cannot_do_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, album: Path
) -> None:
    assert main_code([str(album), "--workers", "2"]) == 2
    assert "--workers 2 is for --engine ray" in capsys.readouterr().err
    folder = album.parent / "relative"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ConfigError, match="no LLaVA folder; caption with --engine local"):
        describe_model(str(folder))
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main_code([str(album), "-o", str(album.parent / "no.jsonl"), "--engine", "ray"]) == 2
    assert "pip install 'vlm[ray]'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main_code([str(album), "--engine", "ray"]) == 2
    assert "start it without a launcher" in capsys.readouterr().err
