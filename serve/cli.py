"""The `vlm` command: each function is one subcommand.

Nothing heavy is imported before a command needs it, so that ``vlm --help`` answers at
once. This is the one file that knows all four packages, and the one place where an
error of the project becomes a line on standard error and exit code 2.
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from serve import caption_command, data_command, folders, plan_command, talk_command
from serve.options import BatchSize, Device, Dtype, Model, Quantize, Seed, open_model
from vlm import __version__
from vlm.errors import ConfigError, VlmError
from vlm.startup import skip_final_gc

app = typer.Typer(
    help="Compose, train, chat with and caption by vision-language assistants.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Make training and evaluation data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Run the command line; errors of the project end it with one line and code 2."""
    try:
        app()
    except VlmError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    finally:
        skip_final_gc()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlm {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


talk_command.register(app)
caption_command.register(app)


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder with records.jsonl, or a .jsonl file.")],
    model: Model = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write figures and all answers here.")
    ] = None,
    shuffled: Annotated[bool, typer.Option(help="Ask about somebody else's picture.")] = False,
    blind: Annotated[bool, typer.Option(help="Ask without any picture.")] = False,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Measure answers against a data set; --shuffled and --blind show what guessing gets."""
    from vlm.evaluation import evaluate as measure
    from vlm.messages import read_records

    if shuffled and blind:
        raise ConfigError("--shuffled and --blind exclude each other; run one at a time")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no such folder; make it first")
    records = list(read_records(data / "records.jsonl" if data.is_dir() else data))
    report = measure(
        open_model(model, device, dtype, quantize),
        records,
        shuffle_pictures=shuffled,
        blind=blind,
        seed=seed,
        batch_size=batch_size,
    )
    print(report)
    if json_file is not None:
        json_file.write_text(report.to_json(with_answers=True) + "\n", encoding="utf-8")


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [KEY=VALUE]...]...",
            help="A shipped recipe's name or a .yaml file, then values such as lora.r=8; "
            "several run one after the other.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done, and do nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint, or fail.")] = False,
) -> None:
    """Train as recipes say, with some of their values replaced.

    Exit codes: 0 done, or stopped by SIGTERM with a checkpoint; 2 wrong usage or data; 130
    after Ctrl-C. The same command goes on.
    """
    from train.config import describe_recipes, load_config

    if list_:
        for name, about in describe_recipes().items():
            print(f"{name}: {about}")
        return
    if not arguments or "=" in arguments[0]:
        raise ConfigError("name a recipe: vlm train RECIPE; `vlm train --list` shows them")
    jobs = split_jobs(arguments)
    configs = [load_config(*job) for job in jobs]  # wrong keys are told before torch is loaded
    if dry_run:
        from rich.console import Console

        from train.summary import summarize

        _refuse(summarize(configs, Console()))
        return
    from train.preflight import problems_of
    from train.run import Interrupted, run

    _refuse(problems_of(configs))
    try:
        for recipe, overrides in jobs:
            print(run(recipe, overrides, resume=resume))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def _refuse(problems: list[str]) -> None:
    """End with code 2 and a line for each problem, if there are any."""
    for problem in problems:
        print("error:", " ".join(problem.split()), file=sys.stderr)
    if problems:
        raise typer.Exit(2)


def split_jobs(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Recipes, each with the values that follow it; a recipe comes first."""
    jobs: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if "=" in argument:
            jobs[-1][1].append(argument)
        else:
            jobs.append((argument, []))
    return jobs


folders.register(app)
plan_command.register(app, lambda: importlib.import_module("train.plan"))
data_command.register(data_app, lambda name: importlib.import_module(f"data_recipes.{name}"))
