"""Ranks that hold slices of a model see what one process sees, and their result is whole."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from train.run import run

NUMBERS = ("loss", "eval_loss", "padding_share")
NORMS = ("grad_norm", "grad_norm_adapter", "grad_norm_projector")
PROBES = ("probe_right", "probe_blank", "probe_other")


def history(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "history.json").read_text())
    return rows


def test_two_slices_see_what_one_process_does(
    tmp_path: Path, recipe: Callable[..., str], scenes: Callable[..., str], llava: str
) -> None:
    data = scenes("instruct")
    held_out = Path(data).with_name("five.jsonl")  # for 2 ranks x 2: the last has none of them
    held_out.write_text("".join(Path(data).read_text().splitlines(keepends=True)[:5]))
    values = {"stage": "instruct", "data": [data], "model": {"start": llava}}
    values |= {"eval_data": str(held_out)}
    values |= {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "log_steps": 1, "eval_steps": 2}
    values |= {"watch": {"samples": 2, "probes": 3}, "learning_rate": 0.003}
    alone = run(recipe(tmp_path / "alone", **values | {"batch_size": 4}))
    path = recipe(tmp_path / "both", **values | {"batch_size": 2, "sharding": "fsdp2"})
    script = tmp_path / "script.py"
    script.write_text("import sys, train.run\ntrain.run.run(sys.argv[1])\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(script), path]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **streams) as started:  # type: ignore[call-overload]
        try:
            told, errors = started.communicate(timeout=180)
        finally:
            started.terminate()  # it ends its ranks, which a kill would leave behind
    assert started.returncode == 0, errors[-3000:]
    assert told.count("no sample answers: sharding=fsdp2") == 1
    both = tmp_path / "both"
    assert not (both / "samples.jsonl").exists() and (both / "report.html").is_file()
    for key in (*NUMBERS, *NORMS, *PROBES):
        one, two = ([row[key] for row in history(out) if key in row] for out in (alone, both))
        assert one == pytest.approx(two, rel=1e-4), key
        assert len(one) >= 1, key
    whole, gathered = (load_file(out / "model.safetensors") for out in (alone, both))
    assert whole.keys() == gathered.keys()
    for name, tensor in whole.items():
        assert (tensor - gathered[name]).abs().max() <= 1e-5, name
