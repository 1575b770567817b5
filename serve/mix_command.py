"""`vlm data mix`: several sources to one file, in an order that is settled by a seed."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from serve.fault_list import fault_list
from serve.options import SkipFaults, open_processor


def register(app: typer.Typer, open_mix: Callable[[], ModuleType]) -> None:
    """Add the command; `open_mix` imports the package that mixes, when it is needed."""

    @app.command()
    def mix(
        recipe: Annotated[Path, typer.Argument(metavar="MIX.YAML", help="Sources and shares.")],
        out: Annotated[Path, typer.Option(help="Folder to write.")],
        model: Annotated[
            str | None, typer.Option(help="That counts tokens, for filters by tokens.")
        ] = None,
        skip_faults: SkipFaults = False,
    ) -> None:
        """Mix sources: records.jsonl and mix.json, the same wherever and whenever it is made.

        Exit codes: 0 done; 1 done, and rows were passed over; 2 wrong usage or a bad row.
        """
        package = open_mix()
        config = package.load_mix(recipe)
        processor = None if model is None else open_processor(model)
        from serve.progress import counting

        out.mkdir(parents=True, exist_ok=True)
        with fault_list(out, skip_faults) as faults, counting("mixing", None) as step:
            mixed = package.mix(config, out, processor=processor, faults=faults, progress=step)
        print(mixed)
        print(out / "records.jsonl")
        if faults:
            faults.end()
