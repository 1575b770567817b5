"""A training run from recipe to model folder, told in order."""

import shutil
import time
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from train.config import RunConfig, list_recipes, load_config, save_config
from train.dataset import RecordDataset
from train.jobs import JOBS
from train.report import is_result, run_record, write_curves
from train.samples import survey_data
from train.stages import STAGES, apply_stage, stage_table
from train.trainer import CHECKPOINTS, StageTrainer, last_checkpoint
from vlm.errors import ConfigError

__all__ = ["Interrupted", "list_recipes", "run"]


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal after it wrote a checkpoint."""


def run(recipe: str, overrides: list[str] | None = None) -> Path:
    """Train as a recipe says and return the folder of the result.

    A folder that holds the finished result of the same recipe is returned as it is; one
    that holds checkpoints of it is continued.

    Raises:
        ConfigError: the recipe is wrong, or the folder belongs to another run.
        RecordError: a data file is missing or malformed.
        CheckpointError: a model folder cannot be opened.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on from the checkpoint.
    """
    console = Console()
    config = load_config(recipe, overrides)
    output = Path(config.output)
    if _is_finished(config, output):
        console.print(f"{output} holds the finished result of this recipe")
        return output
    started = time.monotonic()
    set_seed(config.seed)
    data = RecordDataset(config.data)
    held_out = RecordDataset([config.eval_data]) if config.eval_data else None
    job = JOBS[config.stage](config, data)
    report = apply_stage(job.model, STAGES[config.stage], config.lora)
    samples, notes = survey_data(config, job.dialogues, data)
    tested, _ = survey_data(config, job.dialogues, held_out, "held-out") if held_out else (None, [])
    console.print(stage_table(config.stage, report), *job.notes, *notes, sep="\n")

    trainer = StageTrainer(
        run_config=config,
        around=job.around,
        model=job.model,
        data_collator=job.collate,
        train_dataset=samples,
        eval_dataset=tested,
    )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        save_config(config, output / "run.yaml")
    last = last_checkpoint(output / CHECKPOINTS)
    if last:
        console.print(f"continuing from {last}")
    trainer.train_from(last)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the same command continues"
        )

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
        job.write(output, record)
        shutil.rmtree(output / CHECKPOINTS)
    trainer.accelerator.wait_for_everyone()
    return output


def _is_finished(config: RunConfig, output: Path) -> bool:
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
