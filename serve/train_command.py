"""`vlm train`: one recipe or several in a row."""

import sys
from typing import Annotated

import typer

from vlm.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the `vlm` command."""
    app.command()(train)


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

        for config in configs:
            summarize(config, Console())
        return
    from train.run import Interrupted, run

    try:
        for recipe, overrides in jobs:
            print(run(recipe, overrides, resume=resume))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def split_jobs(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """Recipes, each with the values that follow it; a recipe comes first."""
    jobs: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if "=" in argument:
            jobs[-1][1].append(argument)
        else:
            jobs.append((argument, []))
    return jobs
