"""Watching a run: numbers, answers, sight probes, a bar, trackers and the report.

Nothing here changes what is learnt: random numbers, training modes and weights are as they
were before, and a run with all of it gives the weights of a run without, bit for bit. All
ranks do the same at the same time; the first one writes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.checkpoints import telling_full_disk
from train.config import RunConfig
from train.gallery import FILE as SAMPLES
from train.gallery import Gallery
from train.jobs import Job
from train.meter import Meter
from train.page import FILE as PAGE
from train.page import write_page
from train.probes import Probes
from train.progress import TellProgress
from train.stages import PartReport
from train.survey import Samples
from train.trackers import trackers
from train.trainer import StageTrainer

_WHOLE_WEIGHTS = ("none", "zero2")  # kinds of sharding that leave each rank all weights


class Watch(TrainerCallback):
    """Looks at the model now and then, and adds to what Trainer logs.

    Args:
        trainer: of the run.
        config: of the run.
        meter: of its model.
        gallery: sample answers, or None.
        probes: sight probes, or None.
        parts: what trains, for the report.
    """

    def __init__(
        self,
        trainer: StageTrainer,
        config: RunConfig,
        meter: Meter,
        gallery: Gallery | None,
        probes: Probes | None,
        parts: Sequence[PartReport],
    ) -> None:
        self._trainer, self._config, self._parts = trainer, config, parts
        self._meter, self._gallery, self._probes = meter, gallery, probes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what an earlier part of the run left."""
        if self._gallery is not None:
            with telling_full_disk(SAMPLES):
                self._gallery.begin(state.global_step)
        self._meter.begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients of a step that will be logged."""
        if (state.global_step + 1) % state.logging_steps == 0:
            self._meter.look_at_step(kwargs["optimizer"].param_groups)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where no evaluation will: without held-out records, as often as with them."""
        self._meter.step_ended()
        due = state.global_step % state.eval_steps == 0 or state.global_step == state.max_steps
        if due and self._trainer.eval_dataset is None:
            self._look(state)
            self._meter.rested()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the meter's numbers, for history and trackers."""
        if logs is not None and "loss" in logs:
            numbers = self._meter.numbers(logs)
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, beside the held-out loss."""
        self._look(state)
        self._meter.rested()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report anew, so that a run that is killed has one."""
        self.write()
        self._meter.rested()

    def write(self) -> None:
        """Write ``report.html``, from the first rank alone."""
        state = self._trainer.state
        if state.is_world_process_zero:
            answers = [] if self._gallery is None else self._gallery.answers
            with telling_full_disk(PAGE):
                write_page(self._config, self._parts, state, answers, self._counts())

    def _counts(self) -> dict[str, int]:
        sets = {"training": self._trainer.train_dataset, "held out": self._trainer.eval_dataset}
        return {name: len(data) for name, data in sets.items() if data is not None}

    def _look(self, state: TrainerState) -> None:
        device = self._trainer.args.device
        kept = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=kept), telling_full_disk(SAMPLES):
            if self._gallery is not None:
                self._gallery.ask(state.global_step)
            if self._probes is not None:
                self._trainer.log(self._probes.measure().numbers())


@contextmanager
def watched(
    trainer: StageTrainer,
    config: RunConfig,
    job: Job,
    parts: Sequence[PartReport],
    console: Console,
) -> Iterator[None]:
    """Inside, the trainer's run is watched as the recipe says; see `train.settings.WatchConfig`.

    Args:
        trainer: with its records.
        config: of the run.
        job: of its stage; those without pictures have neither samples nor probes.
        parts: what trains, for the report.
        console: for lines and the bar, in place of Trainer's own.

    Raises:
        CheckpointError: the disk is full.
    """
    meter = Meter(
        job.model,
        lambda: trainer.num_drawn,
        lambda: trainer.seconds_waited,
        trainer.accelerator.reduce,
    )
    gallery, probes = _gallery(trainer, config, job, console), _probes(trainer, config, job)
    watch = Watch(trainer, config, meter, gallery, probes, parts)
    progress = TellProgress(console)
    trainer.remove_callback(transformers.trainer.DEFAULT_PROGRESS_CALLBACK)
    # The order matters: what the first adds to a log, the others show.
    for callback in (watch, *trackers(config.watch.report_to, Path(config.output)), progress):
        trainer.add_callback(callback)
    try:
        yield
        watch.write()
    finally:
        progress.close()
        meter.close()


def _gallery(
    trainer: StageTrainer, config: RunConfig, job: Job, console: Console
) -> Gallery | None:
    if job.dialogues is None or not config.watch.samples:
        return None
    first = trainer.is_world_process_zero()
    if config.sharding not in _WHOLE_WEIGHTS:
        if first:
            console.print(f"no sample answers: sharding={config.sharding} leaves no rank a model")
        return None
    data = trainer.eval_dataset or trainer.train_dataset
    path = Path(config.output) / SAMPLES
    return Gallery(job, data, config.watch.samples, path, writes=first)


def _probes(trainer: StageTrainer, config: RunConfig, job: Job) -> Probes | None:
    held_out = trainer.eval_dataset
    if job.dialogues is None or held_out is None:
        return None
    assert isinstance(held_out, Samples)
    probes = Probes(job, held_out, config.watch.probes)
    return probes if len(probes) else None
