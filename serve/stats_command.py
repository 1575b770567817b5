"""`vlm data stats`: what data holds, as tables and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.fault_list import FaultCount
from serve.options import AnyData, FormatName, Pictures, Split, open_processor
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 12  # rows of a table of names


def register(app: typer.Typer, package: Callable[[str], ModuleType]) -> None:
    """Add the command; `package` imports a module of the data recipes by its name."""

    @app.command()
    def stats(
        data: AnyData,
        model: Annotated[str | None, typer.Option(help="That counts tokens.")] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Write all figures here.")
        ] = None,
        from_: FormatName = None,
        images: Pictures = None,
        split: Split = None,
    ) -> None:
        """Count records, pictures, turns, words, tokens, answers, sources and licences.

        Exit codes: 0 done; 1 done, and rows could not be read; 2 wrong usage.
        """
        from rich.console import Console

        if json_file is not None and not json_file.parent.is_dir():
            raise ConfigError(f"--json {json_file}: there is no such folder; make it first")
        processor = None if model is None else open_processor(model)
        faults = FaultCount()
        records = package("formats").read(
            data, format=from_, images=images, split=split, faults=faults
        )
        found = package("stats").stats(faults.some(records), processor).summary()
        found["unreadable_rows"] = faults.num
        console = Console(soft_wrap=False)
        for table in tables(found):
            console.print(table)
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        faults.end()


def tables(found: dict[str, Any]) -> list["Table"]:
    """The tables of a summary of `data_recipes.stats`."""
    from rich.table import Table

    plain = ("records", "with_pictures", "without_pictures", "without_answers", "visual_tokens")
    counts = Table("", title="Records", title_justify="left", show_header=False)
    for key in (*plain, "too_long", "unreadable_rows"):
        if key in found:
            counts.add_row(key.replace("_", " "), f"{found[key]:,}")
    lengths = Table("", title="Lengths", title_justify="left")
    for name in ("sum", "mean", "min", "median", "p95", "max"):
        lengths.add_column(name, justify="right")
    rows = {
        **{f"{name} a record": each for name, each in found["per_record"].items()},
        **{f"{name} a turn": each for name, each in found["per_turn"].items()},
    }
    for name, each in rows.items():
        shown = (f"{value:,.1f}" if key == "mean" else f"{value:,}" for key, value in each.items())
        lengths.add_row(name, *shown)
    short, long = found["short_answers"], found["long_answers"]
    answers = f"Short answers: {short['total']:,} of {short['total'] + long:,}"
    names = {
        "Sources": found["sources"],
        "Licences": found["licenses"],
        f"{answers}, {short['different']:,} different": short,
    }
    return [
        counts,
        lengths,
        *(_names(title, each) for title, each in names.items() if each["total"]),
    ]


def _names(title: str, found: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("", title=title, title_justify="left", show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    shown = list(found["commonest"].items())[:_SHOWN]
    rest = found["total"] - sum(number for _, number in shown)
    for name, number in shown:
        table.add_row(Text(name), f"{number:,}", f"{number / found['total']:.1%}")
    if rest:
        table.add_row("all others", f"{rest:,}", f"{rest / found['total']:.1%}", style="dim")
    return table
