"""`vlm data preview`: a contact sheet of records, learnt tokens marked."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from serve.fault_list import FaultCount
from serve.options import AnyData, FormatName, Model, Pictures, Seed, Split, open_processor
from vlm.errors import ConfigError


def register(app: typer.Typer, package: Callable[[str], ModuleType]) -> None:
    """Add the command; `package` imports a module of the data recipes by its name."""

    @app.command()
    def preview(
        data: AnyData,
        out: Annotated[Path, typer.Option(help="File to write.")] = Path("preview.html"),
        model: Model = None,
        num: Annotated[int, typer.Option(min=1, help="Records to show.")] = 64,
        seed: Seed = 0,
        template: Annotated[
            Literal["chat", "plain"], typer.Option(help="Of the training recipe.")
        ] = "chat",
        from_: FormatName = None,
        images: Pictures = None,
        split: Split = None,
    ) -> None:
        """Show records as the model gets them: pictures, turns, and tokens, learnt ones marked.

        Exit codes: 0 done; 1 done, and rows could not be read; 2 wrong usage.
        """
        from vlm.as_seen import AsSeen

        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: there is no such folder; make it first")
        processor = open_processor(model)
        faults = FaultCount()
        records = package("formats").read(
            data, format=from_, images=images, split=split, faults=faults
        )
        package("preview").preview(
            faults.some(records),
            out,
            AsSeen(processor if template == "chat" else processor.plain()),
            title=data,
            model=model or "the built-in model",
            num=num,
            seed=seed,
        )
        print(out)
        faults.end()
