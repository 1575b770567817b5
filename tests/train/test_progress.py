"""Lines for a log, one bar for a person."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from train.progress import TellProgress
from train.run import run
from vlm.errors import RecordError

Recipe = Callable[..., str]
Scenes = Callable[..., str]
TRAINING = {
    "loss": 1.5,
    "samples_per_second": 12.34,
    "tokens_per_second": 5678.9,
    "padding_share": 0.25,
    "waiting_share": 0.07,
}
PROBES = {"probe_right": 1, "probe_blank": 2, "probe_other": 2, "probe_gain_low": 0.5}


def told(terminal: bool, first: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    progress = TellProgress(console)
    args = TrainingArguments("unused", use_cpu=True)
    state = TrainerState(global_step=4, max_steps=10, is_world_process_zero=first)
    control = TrainerControl()
    progress.on_train_begin(args, state, control)
    state.global_step = 5
    progress.on_step_end(args, state, control)
    logs: list[dict[str, Any]] = [TRAINING, {"eval_loss": 2.0}, PROBES | {"probe_gain_high": 1.5}]
    for each in [*logs, {"train_runtime": 3.0}]:
        progress.on_log(args, state, control, logs=each)
    progress.close()
    progress.close()
    return file.getvalue()


def test_without_a_terminal_there_are_lines() -> None:
    first, *rest = told(terminal=False).splitlines()
    begin = "step 5/10  loss 1.5000  12.3 samples/s  5,679 tokens/s  25% padding  "
    begin += "7% waiting for data  0:00:"
    assert first.startswith(begin) and first.endswith(" left")
    assert rest == [
        "step 5/10  held-out loss 2.0000",
        "step 5/10  it looks: another picture costs +1.000 nats a token [+0.500, +1.500]",
    ]


def test_on_a_terminal_there_is_a_bar_under_the_news() -> None:
    out = told(terminal=True)
    assert "training" in out and "5/10" in out and "25% padding" in out
    assert "step 5/10  held-out loss 2.0000" in out and "step 5/10  loss" not in out
    assert out.count("\x1b[?25l") == 1 == out.count("\x1b[?25h")  # the cursor comes back


def test_only_the_first_rank_speaks() -> None:
    assert told(terminal=False, first=False) == "" == told(terminal=True, first=False)


def test_a_run_tells_once_and_trainer_itself_says_nothing(
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    run(recipe(tmp_path / "out", **values, log_steps=2))
    out, err = capfd.readouterr()
    assert [line.split()[1] for line in out.splitlines() if " loss " in line] == ["2/4", "4/4"]
    assert "{'loss'" not in out + err and "it/s]" not in out + err


def test_the_terminal_comes_back_after_an_error(
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import train.run

    class Broken(train.run.StageTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            raise RecordError("broken")

    monkeypatch.setattr(train.run, "StageTrainer", Broken)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    with pytest.raises(RecordError, match="broken"):
        run(recipe(tmp_path / "out", **values))
    out = capfd.readouterr().out
    assert out.count("\x1b[?25l") == 1 == out.count("\x1b[?25h")
