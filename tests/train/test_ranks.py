"""Two ranks train as one does, and stop together."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.run import run
from vlm.checkpoint import load_checkpoint
from vlm.history import read_history
from vlm.messages import read_records
from vlm.testing import draw_image

NUM_RECORDS = 12
NUM_PROJECTOR, NUM_LINEARS = 4, 14  # tensors of the projector, linear layers of the tiny decoder
ANSWERS = ("a", "red fish", "two guitars, " * 8, "left")

# Only rank 0 gets a signal, in its second step; both must stop, and then go on.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import train.run

rank = int(os.environ["RANK"])
waiting = [signal.SIGTERM] if rank == 0 else []
told = []

class Watched(train.run.StageTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 0:
            told.append(f"{self.args.world_size} {type(self.model_wrapped).__name__}")
        while waiting and self.state.global_step == 1:
            signal.raise_signal(waiting.pop())
        return super().training_step(*args, **kwargs)

train.run.StageTrainer = Watched
try:
    train.run.run(sys.argv[1])
except train.run.Interrupted as stopped:
    told.append(str(stopped))
train.run.run(sys.argv[1])
Path(sys.argv[1]).with_name(f"rank{rank}.txt").write_text("\\n".join(told))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_records: Callable[..., str]) -> str:
    """Answers of different lengths and a single picture: one rank always goes without."""
    folder = tmp_path_factory.mktemp("ranks")
    draw_image().save(folder / "a.png")
    rows = [
        (["a.png"] if n == 0 else [], f"what is {n}?", ANSWERS[n % len(ANSWERS)])
        for n in range(NUM_RECORDS)
    ]
    path = write_records(folder, rows)
    assert len(list(read_records(path))) == NUM_RECORDS
    return path


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., str], data: str, llava: str
) -> tuple[Path, Path]:
    """The folders of the same training by one rank and by two."""
    folder = tmp_path_factory.mktemp("results")
    values = {"stage": "instruct", "data": [data], "model": {"start": llava}, "log_steps": 1}
    values |= {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "warmup_steps": 0, "save_steps": 1}
    alone = run(recipe(folder / "alone", batch_size=4, **values))
    path = recipe(folder / "both", batch_size=1, gradient_accumulation=2, **values)
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(folder / "script.py"), path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            _, told = started.communicate(timeout=180)
        finally:
            started.terminate()  # it ends its ranks, which a kill would leave behind
    assert started.returncode == 0, told[-3000:]
    return alone, folder / "both"


def test_two_ranks_were_two_and_stopped_together(results: tuple[Path, Path]) -> None:
    for rank in range(2):
        told = (results[1].parent / f"rank{rank}.txt").read_text().splitlines()
        assert told[:-1] == ["2 DistributedDataParallel"] * 2  # both micro-batches of a step
        assert told[-1].startswith("stopped at step 2 of 3")


def test_two_ranks_learn_what_one_does(results: tuple[Path, Path], llava: str) -> None:
    start, alone, both = (load_checkpoint(f)[0].state_dict() for f in (llava, *results))
    changed = {name for name in start if not torch.equal(start[name], alone[name])}
    assert len(changed) == NUM_PROJECTOR + NUM_LINEARS
    for name in changed:
        moved = (alone[name] - start[name]).abs().max()
        assert (alone[name] - both[name]).abs().max() <= 1e-3 * moved, name
    assert all(torch.equal(start[name], both[name]) for name in start.keys() - changed)


def test_two_ranks_report_the_loss_of_one(results: tuple[Path, Path]) -> None:
    alone, both = (json.loads((folder / "history.json").read_text()) for folder in results)
    for key in ("loss", "grad_norm"):
        one, two = ([row[key] for row in history if key in row] for history in (alone, both))
        assert len(one) == 3
        assert one == pytest.approx(two, rel=1e-5)


def test_the_folder_of_two_ranks_is_whole(results: tuple[Path, Path]) -> None:
    alone, both = ({p.name for p in folder.rglob("*")} for folder in results)
    assert alone == both and "vlm.json" in both
    last = read_history(results[1])[-1]
    assert (last["steps"], last["data"]["records"], last["num_processes"]) == (3, NUM_RECORDS, 2)
