"""`vlm train` killed ten times, anywhere, ends as if it had never been."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from train.run import run

# 24 steps of two micro-batches, a checkpoint every second step; dropout draws lots.
VALUES = {
    "gradient_accumulation": 2,
    "epochs": 12,
    "log_steps": 1,
    "save_steps": 2,
    "watch": {"samples": 0, "probes": 0},
}
NUM_BATCHES = 48
KINDS = ("batch:", "write:", "end ")

# One process that has loaded everything becomes many: each is a `vlm train` of its own and
# dies where it is told, before a micro-batch or at some file of a checkpoint.
SCRIPT = """
import os, signal, sys
import train.run
from serve.cli import main

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before_batch(wanted):
    class Struck(train.run.StageTrainer):
        def training_step(self, *args, **kwargs):
            done = 2 * self.state.global_step + self.__dict__.setdefault("half", 0)
            self.half = 1 - self.half
            if done == wanted:
                die()
            return super().training_step(*args, **kwargs)
    train.run.StageTrainer = Struck

def while_writing(wanted):
    seen = []
    def hook(event, args):
        if event in ("open", "os.rename", "os.mkdir") and ".writing" in str(args[0]):
            seen.append(event)
            if len(seen) == wanted:
                die()
    sys.addaudithook(hook)

def child(point):
    kind, _, number = point.partition(":")
    if kind != "end":
        {"batch": before_batch, "write": while_writing}[kind](int(number))
    sys.argv = ["vlm", "train", recipe]
    main()

recipe, *points = sys.argv[1:]
for point in points:
    pid = os.fork()
    if pid == 0:
        child(point)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(point, os.waitstatus_to_exitcode(status), flush=True)
"""


def kill_points() -> list[str]:
    """Seven micro-batches in rising order, and between them three files of a checkpoint."""
    lots = random.Random(5)
    batches = sorted(lots.sample(range(1, NUM_BATCHES), 7))
    points = [f"batch:{number}" for number in batches]
    for place in sorted(lots.sample(range(1, 7), 3), reverse=True):
        points.insert(place, f"write:{lots.randint(1, 8)}")
    return points


def outcome(output: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """All weights as bytes, and every logged row but its timings."""
    files = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.safetensors")}
    rows = json.loads((output / "history.json").read_text())
    logged = [row for row in rows if "loss" in row]
    of_time = ("_per_second", "waiting_share")
    return files, [{k: v for k, v in r.items() if not k.endswith(of_time)} for r in logged]


def test_ten_kills_change_nothing(
    tmp_path: Path, recipe: Callable[..., str], scenes: Callable[..., str], llava: str
) -> None:
    lora = {"r": 4, "alpha": 8, "dropout": 0.2}
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    whole = run(recipe(tmp_path / "whole", lora=lora, **values | VALUES))
    path = recipe(tmp_path / "killed", lora=lora, **values | VALUES)
    points = kill_points()
    assert len(points) == 10
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, *points, "end"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    ends = [line.split() for line in told.stdout.splitlines() if line.startswith(KINDS)]
    assert ends == [*([point, "-9"] for point in points), ["end", "0"]], told.stderr[-3000:]
    assert outcome(tmp_path / "killed") == outcome(whole)
    assert not (tmp_path / "killed" / "checkpoints").exists()
