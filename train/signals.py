"""A run that is told to stop finishes its step, writes a checkpoint and ends."""

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.ranks import highest

# Ctrl-C; what schedulers send before they kill; SLURM's word for pre-emption.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal after it wrote a checkpoint.

    Attributes:
        exit_code: 130 after Ctrl-C, as shells report it; 0 after a scheduler's signal,
            which asked for just this.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 0


class StopOnSignal(TrainerCallback):
    """The first signal stops all ranks after their step; a second one kills.

    Attributes:
        number: the signal that came to any rank, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Take over the signals."""
        for name in _NAMES:
            if hasattr(signal, name):  # Windows has not all of them
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._stop)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Ask for a checkpoint and the end, once a signal came to any rank."""
        # A rank that stopped alone would leave the others waiting.
        self.number = highest(self.number, args.device, args.world_size)
        if self.number:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])
