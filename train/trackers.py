"""Trackers of transformers' Trainer, such as TensorBoard, named in ``watch.report_to``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from vlm.errors import ConfigError, MissingExtraError
from vlm.messages import nearest

LOGS = "logs"  # in a run's output folder


def check_trackers(names: Sequence[str]) -> None:
    """Tell before anything is loaded which trackers there are not.

    Raises:
        ConfigError: no tracker has such a name.
        MissingExtraError: its package is not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"watch.report_to has {name!r}, which is no tracker"
                f"{nearest(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            package = "'vlm[tensorboard]'" if name == "tensorboard" else name
            raise MissingExtraError(
                f"watch.report_to={name} needs a package that is not installed: "
                f"pip install {package}"
            ) from error


def trackers(names: Sequence[str], output: Path) -> list[TrainerCallback]:
    """The trackers' callbacks; TensorBoard writes below ``logs``, others where they are told."""
    return [
        _Board(output / LOGS) if name == "tensorboard" else INTEGRATION_TO_CALLBACK[name]()
        for name in names
    ]


class _Board(TensorBoardCallback):
    """TensorBoard in a folder of ours; what a killed run wrote too far is hidden."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Open the folder for the steps after the one that the run goes on from."""
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)
