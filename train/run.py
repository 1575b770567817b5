"""A training run from recipe to model folder, told in order."""

import shutil
import time
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from train.checkpoints import CHECKPOINTS, last_checkpoint, run_lock, telling_full_disk
from train.config import RunConfig, list_recipes, load_config, save_config
from train.dataset import RecordDataset
from train.jobs import JOBS, rebuild
from train.precision import is_rounded, prepare_dtypes, restore_dtypes
from train.quarantine import FILE as QUARANTINE
from train.quarantine import Quarantine
from train.ranks import is_first_rank
from train.report import is_result, run_record, write_curves
from train.samples import survey_data
from train.sharding import check_sharding, whole_model
from train.signals import Interrupted
from train.stages import apply_run, stage_table
from train.trackers import check_trackers
from train.trainer import StageTrainer
from train.watch import watched
from vlm.errors import ConfigError

__all__ = ["Interrupted", "is_finished", "list_recipes", "run"]


def run(recipe: str, overrides: list[str] | None = None, *, resume: bool = False) -> Path:
    """Train as a recipe says and return the folder of the result.

    A folder that holds the finished result of the same recipe is returned as it is; one
    that holds checkpoints of it is continued.

    Args:
        recipe: a file, or the name of a shipped one.
        overrides: ``key=value``, in place of the recipe's.
        resume: refuse to begin anew.

    Raises:
        ConfigError: the recipe is wrong, the folder belongs to another run or is in use, or
            there is nothing to resume.
        RecordError: a data file is missing or malformed.
        CheckpointError: a model folder cannot be opened, or the disk is full.
        MissingExtraError: a tracker or DeepSpeed is not installed.
        DivergenceError: a loss or gradient is NaN or infinite.
        ErrorLimitError: too many records have bad pictures.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1; the same call goes on from the checkpoint.
    """
    console = Console(quiet=not is_first_rank())
    config = load_config(recipe, overrides)
    output = Path(config.output)
    if is_finished(config, output):
        console.print(f"{output} holds the finished result of this recipe")
        return output
    if resume and last_checkpoint(output / CHECKPOINTS) is None:
        raise ConfigError(f"{output} holds no checkpoint to resume; leave --resume out to begin")
    check_sharding(config)
    check_trackers(config.watch.report_to)
    data = RecordDataset(config.data)
    held_out = RecordDataset([config.eval_data]) if config.eval_data else None
    with run_lock(output):
        if not is_finished(config, output):  # by another run, until it gave up the lock
            _train(config, console, data, held_out)
    return output


def _train(
    config: RunConfig, console: Console, data: RecordDataset, held_out: RecordDataset | None
) -> None:
    started = time.monotonic()
    output = Path(config.output)
    set_seed(config.seed)
    job = JOBS[config.stage](config, data)
    report = apply_run(job.model, config)
    stored = prepare_dtypes(job.model, config.precision)
    samples, notes = survey_data(config, job.dialogues, data)
    tested, _ = survey_data(config, job.dialogues, held_out, "held-out") if held_out else (None, [])
    console.print(stage_table(config.stage, report), *job.notes, *notes, sep="\n")

    trainer = StageTrainer(
        run_config=config,
        around=job.around,
        model=job.model,
        data_collator=Quarantine(job.collate, samples),
        train_dataset=samples,
        eval_dataset=tested,
    )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "run.yaml")
    last = last_checkpoint(output / CHECKPOINTS)
    if last:
        console.print(f"continuing from {last}")
    with watched(trainer, config, job, report, console):
        trainer.train_from(last)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the same command continues",
            trainer.stopped_by,
        )

    with whole_model(job.model), telling_full_disk(f"the result in {output}"):
        if trainer.is_world_process_zero():
            write_curves(output, config.stage, trainer.state.log_history)
            record = run_record(
                config,
                data,
                report,
                trainer.state.log_history,
                steps=trainer.state.global_step,
                num_processes=trainer.args.world_size,
                seconds=time.monotonic() - started,
            )
            if trainer.averages is not None:
                trainer.averages.put_in()
            if is_rounded(job.model, stored):
                job = rebuild(config, data, job.model)
            else:
                restore_dtypes(job.model, stored)
            job.write(output, record)
            shutil.rmtree(output / CHECKPOINTS)
    _tell_quarantined(console, trainer, output)
    trainer.accelerator.wait_for_everyone()


def _tell_quarantined(console: Console, trainer: StageTrainer, output: Path) -> None:
    if trainer.num_quarantined:
        console.print(
            f"{trainer.num_quarantined} records were passed over for their pictures; see "
            f"{output / QUARANTINE}"
        )


def is_finished(config: RunConfig, output: Path) -> bool:
    """Whether the folder holds this run's result; its record is written last.

    A folder where an earlier run failed before its first checkpoint is free.
    """
    written = output / "run.yaml"
    if not written.is_file():
        return False
    theirs = load_config(str(written))
    finished = is_result(output, theirs)
    if not (finished or last_checkpoint(output / CHECKPOINTS)):
        return False
    if theirs != config:
        raise ConfigError(
            f"{output} belongs to another run (see {written}); choose another output=DIR "
            "or remove that folder"
        )
    return finished
