"""A run as it goes on: one bar where a person watches, else a line now and then."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.probes import verdict

Logs = Mapping[str, Any]


class TellProgress(TrainerCallback):
    """Tells steps, loss, pace and the time left, from the first rank alone.

    Args:
        console: where other lines of the run go too.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._started, self._first = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar."""
        self._started, self._first = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            *(TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn()),
            *(TextColumn("{task.fields[told]}"), Remaining()),
        )
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, told=""
        )
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """An evaluation is under way."""
        if self._bar is not None:
            self._bar.update(self._task, description="evaluating")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """It is done."""
        if self._bar is not None:
            self._bar.update(self._task, description="training")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest numbers."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs and self._bar is not None:
            self._bar.update(self._task, told=_numbers(logs))
        elif "loss" in logs:
            self._say(f"{self._where(state)}  {_numbers(logs)}  {self._left(state)}")
        elif "eval_loss" in logs:
            self._say(f"{self._where(state)}  held-out loss {logs['eval_loss']:.4f}")
        elif "probe_right" in logs:
            self._say(f"{self._where(state)}  {verdict(logs)}")

    def close(self) -> None:
        """Give the terminal back, after an error too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _where(self, state: TrainerState) -> str:
        return f"step {state.global_step}/{state.max_steps}"

    def _left(self, state: TrainerState) -> str:
        """The time left at the pace since this part of the run began."""
        done, steps = state.global_step - self._first, state.max_steps - state.global_step
        seconds = round((time.monotonic() - self._started) / max(done, 1) * steps)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


def _numbers(logs: Logs) -> str:
    told = [f"loss {logs['loss']:.4f}"]
    if "samples_per_second" in logs:
        told.append(f"{logs['samples_per_second']:,.1f} samples/s")
        told.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        told.append(f"{logs['padding_share']:.0%} padding")
        told.append(f"{logs['waiting_share']:.0%} waiting for data")
    return "  ".join(told)
