"""Killed and resumed equals uninterrupted, bit for bit."""

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train.run
from train.checkpoints import last_checkpoint
from train.run import Interrupted, run
from train.trainer import StageTrainer
from vlm.errors import CheckpointError, ConfigError, RecordError

Recipe = Callable[..., str]
Strike = Callable[..., None]
Scenes = Callable[..., str]

# Eight records in batches of 2 x 2 for three epochs: six steps, two of them an epoch.
COMMON = {"gradient_accumulation": 2, "epochs": 3, "log_steps": 1, "optimizer": "muon"}
NUM_STEPS = 6

# A run that is struck at the start of a step by a real signal.
STRUCK = """
import signal, sys
import train.run

class Struck(train.run.StageTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == int(sys.argv[2]):
            signal.raise_signal(int(sys.argv[3]))
        return super().training_step(*args, **kwargs)

train.run.StageTrainer = Struck
train.run.run(sys.argv[1])
"""


def instruct(folder: Path, recipe: Recipe, scenes: Scenes, llava: str) -> str:
    lora = {"r": 4, "alpha": 8, "dropout": 0.2}  # dropout draws lots at every step
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    return recipe(folder, lora=lora, **COMMON | values)


def contrastive(folder: Path, recipe: Recipe, scenes: Scenes, llava: str) -> str:
    size = {"image_size": 64, "patch_size": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = {"new_vision": size | {"text_vocab_size": 300}}  # 32 pixels are a close-up: lots again
    values = {"stage": "contrastive", "data": [scenes("phrases")], "model": model}
    return recipe(folder, **COMMON | values)


def result(output: Path) -> tuple[dict[str, bytes], list[float]]:
    """All weights as bytes, and the loss of every step."""
    history = json.loads((output / "history.json").read_text())
    files = {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.safetensors")}
    return files, [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, scenes: Scenes, llava: str
) -> dict[Any, tuple[dict[str, bytes], list[float]]]:
    root = tmp_path_factory.mktemp("whole")
    whole = {
        make: result(run(make(root / make.__name__, recipe, scenes, llava)))
        for make in (instruct, contrastive)
    }
    assert all(len(losses) == NUM_STEPS for _, losses in whole.values())
    return whole


@pytest.mark.parametrize(
    ("make", "step", "number"),
    [
        (instruct, 2, signal.SIGINT),  # stops within an epoch
        (instruct, 3, signal.SIGTERM),  # and at the end of one
        (contrastive, 0, signal.SIGUSR1),  # SLURM tells of pre-emption so
        (contrastive, 5, signal.SIGINT),  # in the last step: the run ends as usual
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    make: Callable[..., str],
    step: int,
    number: int,
    uninterrupted: dict[Any, Any],
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    strike: Strike,
) -> None:
    path = make(tmp_path / "out", recipe, scenes, llava)
    before = signal.getsignal(number)
    strike(step, number)
    if step + 1 < NUM_STEPS:
        stopped = f"stopped at step {step + 1} of {NUM_STEPS}; the same command continues"
        with pytest.raises(Interrupted, match=stopped) as caught:
            run(path)
        assert caught.value.exit_code == (130 if number == signal.SIGINT else 0)
        assert not (tmp_path / "out" / "vlm.json").exists()
        monkeypatch.undo()
    assert result(run(path)) == uninterrupted[make]
    assert signal.getsignal(number) == before


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    uninterrupted: dict[Any, Any], tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    path = instruct(tmp_path / "out", recipe, scenes, llava)
    command = [sys.executable, "-c", STRUCK, path, "4", str(int(signal.SIGKILL))]
    died = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    checkpoints = tmp_path / "out" / "checkpoints"
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    assert result(run(path)) == uninterrupted[instruct]


@pytest.mark.parametrize("state", [None, '{"global_step": 5, "max_s'])
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    state: str | None,
    uninterrupted: dict[Any, Any],
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    strike: Strike,
) -> None:
    path = contrastive(tmp_path / "out", recipe, scenes, llava)
    strike(3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(path)
    monkeypatch.undo()
    torn = tmp_path / "out" / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "trained.safetensors").write_bytes(b"\0" * 100)
    if state is not None:
        (torn / "trainer_state.json").write_text(state)
    assert result(run(path)) == uninterrupted[contrastive]


def test_a_run_that_died_while_writing_takes_no_further_step(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    stop_early = {"max_steps": 3, "epochs": 3, "schedule": "constant", "log_steps": 1}
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    whole = result(run(recipe(tmp_path / "whole", **values | stop_early)))
    path = recipe(tmp_path / "out", **values | stop_early)
    blocked = tmp_path / "out" / "vlm.json"
    blocked.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(path)
    blocked.rmdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half of it")
    assert result(run(path)) == whole
    assert [each["steps"] for each in json.loads(blocked.read_text())["training"]] == [3]


def test_a_second_signal_ends_at_once(
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    strike: Strike,
) -> None:
    path = instruct(tmp_path / "out", recipe, scenes, llava)
    before = signal.getsignal(signal.SIGINT)
    strike(2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(path)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) == before


def test_resume_needs_something_to_resume(
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    strike: Strike,
) -> None:
    path = contrastive(tmp_path / "out", recipe, scenes, llava)
    with pytest.raises(ConfigError, match="no checkpoint to resume"):
        run(path, resume=True)
    assert not (tmp_path / "out").exists()
    strike(2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(path)
    monkeypatch.undo()
    run(path, resume=True)
    assert run(path, resume=True) == tmp_path / "out"  # done is done


def test_a_folder_in_use_is_refused(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = contrastive(tmp_path / "out", recipe, scenes, llava)
    command = [sys.executable, "-c", "from serve.cli import main; main()", "train", path]
    refused = []

    class Watched(StageTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if not refused:
                refused.append(subprocess.run(command, capture_output=True, text=True, timeout=120))
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(train.run, "StageTrainer", Watched)
    run(path)
    assert refused[0].returncode == 2
    line = refused[0].stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: another run is training in {tmp_path / 'out'}; wait for it")
    assert not list((tmp_path / "out").glob("*.lock"))


def test_a_full_disk_keeps_the_last_checkpoint(
    uninterrupted: dict[Any, Any],
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = instruct(tmp_path / "out", recipe, scenes, llava)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(StageTrainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            full = 15_000 if self.state.global_step == 4 else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
            try:
                super()._save_checkpoint(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(train.run, "StageTrainer", Full)
    with pytest.raises(CheckpointError, match=r"step 4 in .* cannot be written .*make room"):
        run(path)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir() if p.is_dir()} == {"checkpoint-2", "checkpoint-3"}
    monkeypatch.undo()
    assert result(run(path)) == uninterrupted[instruct]


def test_signals_are_given_back_after_an_error(tmp_path: Path, recipe: Recipe, llava: str) -> None:
    line = {"id": "bad", "messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    data = [str(tmp_path / "bad.jsonl")]
    with pytest.raises(RecordError):
        run(recipe(tmp_path / "out", stage="instruct", model={"start": llava}, data=data))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
