"""Captioning by two Ray workers: the ledger of one process, also when a worker is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve.cli import main
from vlm import testing
from vlm.caption_job import caption_images
from vlm.caption_ray import RayEngine, describe_model
from vlm.errors import ConfigError

NUM = 24


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
        include_dashboard=False,
        logging_level="ERROR",
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


def by_ray(album: Path, out: Path, **more: Any) -> Any:
    engine = RayEngine(None, 2)
    model: Any = describe_model(None)
    options = {"max_new_tokens": 8, "batch_size": 3, "engine": engine, **more}
    return caption_images(str(album), out, model=model, **options)


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


def workers() -> list[int]:
    names = psutil.process_iter(["pid", "name", "cmdline"])
    return [
        p.info["pid"]
        for p in names
        if "_Worker" in " ".join(p.info["cmdline"] or []) or "_Worker" in (p.info["name"] or "")
    ]


def test_a_worker_that_is_killed_loses_and_doubles_nothing(
    ray: Any, album: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if out.exists() and out.stat().st_size and workers():
                killed.append(workers()[0])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    by_ray(album, out, batch_size=1)
    thread.join()
    assert killed and rows(out) == expected


def test_a_prompt_that_is_too_long_is_told_as_by_one_process(
    ray: Any, album: Path, tmp_path: Path
) -> None:
    from vlm.errors import ContextLengthError

    with pytest.raises(ContextLengthError, match="positions"):
        by_ray(album, tmp_path / "captions.jsonl", prompt="word " * 2000)


def test_what_ray_cannot_do_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, album: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["vlm", "caption", str(album), "--workers", "2"])
    with pytest.raises(SystemExit):
        main()
    assert "--workers 2 is for --engine ray" in capsys.readouterr().err
    folder = album.parent / "relative"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ConfigError, match="no LLaVA folder; caption with --engine local"):
        describe_model(str(folder))
