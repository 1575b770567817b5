"""`vlm data ...`: build, convert, list and examine data."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer

from serve import doctor_command, mix_command, preview_command, stats_command
from serve.fault_list import fault_list
from serve.options import FormatName, Pictures, Seed, SkipFaults, Split
from vlm.errors import ConfigError

DATA_RECIPES = {"scenes": "drawn emoji and shapes on a grid: captions, questions and answers"}

AllowRemote = Annotated[
    bool, typer.Option("--allow-remote", help="Fetch pictures by their URLs, from public hosts.")
]

# Imports a module of the data recipes when it is needed.
Open = Callable[[str], ModuleType]


def register(app: typer.Typer, package: Open) -> None:
    """Add the commands; `package` imports a module of the data recipes by its name."""
    doctor_command.register(app, package)
    mix_command.register(app, lambda: package("mix"))
    preview_command.register(app, package)
    stats_command.register(app, package)
    _register_build(app, package)
    _register_convert(app, package)

    @app.command("list")
    def data_list() -> None:
        """List the data recipes."""
        for name, about in DATA_RECIPES.items():
            print(f"{name}: {about}")
        recipes = package("recipes")
        for name in recipes.RECIPES:
            found = recipes.recipe(name)
            count = f"{found.count:,} records" if found.count else "count unknown"
            print(f"{name}: {found.about} ({count}; {found.license})")

    @app.command("list-formats")
    def list_formats() -> None:
        """List the formats that are read; a row is of the first that fits it."""
        for name, found in package("formats").FORMATS.items():
            print(f"{name}: {found.about}")


def _register_build(app: typer.Typer, package: Open) -> None:
    @app.command("build")
    def data_build(
        recipe: Annotated[str, typer.Argument(help="See `vlm data list`.")],
        out: Annotated[Path, typer.Option(help="Folder to write.")],
        num: Annotated[int, typer.Option(help="Number of pictures.")] = 1000,
        seed: Seed = 0,
        task: Annotated[str, typer.Option(help="What is said: instruct, align, ...")] = "instruct",
        split: Annotated[Literal["train", "test", "heldout"], typer.Option()] = "train",
        max_objects: Annotated[int, typer.Option(help="Most objects in a scene.")] = 4,
        turns: Annotated[int, typer.Option(help="Questions in a dialogue.")] = 6,
        close_up: Annotated[
            bool, typer.Option(help="One object, cut out at half the side.")
        ] = False,
        from_dir: Annotated[Path | None, typer.Option(help="Has the publisher's files.")] = None,
        limit: Annotated[
            int | None, typer.Option(help="Look at so many entries of a public set.")
        ] = None,
        subset: Annotated[
            list[str] | None, typer.Option(help="Of a public set that has subsets; repeatable.")
        ] = None,
        allow_remote: AllowRemote = False,
    ) -> None:
        """Make data: pictures and records.jsonl; --num to --close-up are for scenes."""
        if recipe not in DATA_RECIPES:
            drawn = (num, seed, task, split, max_objects, turns, close_up)
            if drawn != (1000, 0, "instruct", "train", 4, 6, False):
                raise ConfigError(
                    f"{recipe}: --num, --seed, --task, --split, --max-objects, --turns and "
                    "--close-up are for scenes; leave them out, or use --limit"
                )
            public = {"limit": limit, "subsets": subset or (), "fetch": _fetch(allow_remote)}
            _build_public(package, recipe, out, from_dir, public)
            return
        if from_dir is not None or limit is not None or subset or allow_remote:
            raise ConfigError(
                "scenes are drawn: --from-dir, --limit, --subset and --allow-remote do not apply; "
                "use --num"
            )
        from serve.progress import counting

        with counting("drawing", num) as step:
            records = package("scenes").build(
                num,
                seed,
                out,
                task=task,
                turns=turns,
                max_objects=max_objects,
                close_up=close_up,
                split=split,
                progress=step,
            )
        print(records)


def _build_public(
    package: Open, recipe: str, out: Path, from_dir: Path | None, options: dict[str, Any]
) -> None:
    from serve.progress import counting

    build, count = package("build"), package("recipes").recipe(recipe).count
    with counting("building", options["limit"] or count) as step:
        records = build.build(recipe, out, from_dir, build.Options(**options, progress=step))
    print(records)
    print((out / "counts.json").read_text(encoding="utf-8").strip())


def _register_convert(app: typer.Typer, package: Open) -> None:
    @app.command("convert")
    def convert(
        data: Annotated[
            list[str], typer.Argument(help="Files, folders, patterns or hf://OWNER/NAME.")
        ],
        out: Annotated[Path, typer.Option(help="Folder to write.")],
        format_: Annotated[
            Literal["jsonl", "parquet", "llava"], typer.Option("--format", help="To write.")
        ] = "jsonl",
        from_: FormatName = None,
        images: Pictures = None,
        split: Split = None,
        skip_faults: SkipFaults = False,
        allow_remote: AllowRemote = False,
    ) -> None:
        """Convert data of any known format.

        Exit codes: 0 done; 1 done, and rows were passed over; 2 wrong usage or a bad row.
        """
        formats = package("formats")
        write, name = formats.WRITERS[format_]
        target = (out / name).resolve()
        if any(Path(each).resolve() in (target, target.parent) for each in data):
            raise ConfigError(f"--out {out} has the data itself; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        with fault_list(out, skip_faults) as faults:
            options: dict[str, Any] = {"format": from_, "images": images, "split": split}
            options["faults"] = faults
            options["fetch"] = _fetch(allow_remote)
            number = write(
                itertools.chain.from_iterable(formats.read(each, **options) for each in data), out
            )
        print(f"{number:,} records" + (f", {faults.num:,} faults" if faults and faults.num else ""))
        print(out / name)
        if faults:
            faults.end()


def _fetch(is_allowed: bool) -> Callable[[str], bytes] | None:
    from vlm.remote import fetch_picture

    return fetch_picture if is_allowed else None
