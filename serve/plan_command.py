"""`vlm plan`: memory, a micro-batch that fits, and hours, before a run is started."""

import json
from collections.abc import Callable
from types import ModuleType
from typing import Annotated

import typer


def register(app: typer.Typer, planner: Callable[[], ModuleType]) -> None:
    """Add the command to the `vlm` command; `planner` gives `train.plan` when it is wanted."""

    @app.command()
    def plan(
        recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a .yaml file.")],
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
        gpus: Annotated[int, typer.Option(min=1)] = 8,
        card: Annotated[
            str, typer.Option(help="h100, h200, a100, a100-40, l40s or rtx4090.")
        ] = "h100",
        memory: Annotated[
            float | None, typer.Option(min=0.1, help="GB of a card, in place of the card's.")
        ] = None,
        tflops: Annotated[
            float | None, typer.Option(min=1e-6, help="The same for its speed: 989 for an H100.")
        ] = None,
        mfu: Annotated[float, typer.Option(min=0.01, max=1, help="The share reached.")] = 0.45,
        records: Annotated[
            int | None, typer.Option(min=1, help="Of an epoch; by default the data's.")
        ] = None,
        tokens: Annotated[
            int | None, typer.Option(min=2, help="Of a record; by default the data's.")
        ] = None,
        parts: Annotated[
            tuple[str, str] | None,
            typer.Option(help="Folders of tower and language model, where the start is not made."),
        ] = None,
        json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    ) -> None:
        """Tell what a run needs: memory by part, the micro-batch that fits, hours.

        Exit codes: 0 it fits; 2 it does not, or the recipe is wrong.
        """
        found = planner().plan_recipe(
            recipe,
            overrides or [],
            gpus=gpus,
            card=card,
            memory=memory,
            tflops=tflops,
            mfu=mfu,
            records=records,
            tokens=tokens,
            parts=parts,
        )
        if json_:
            told = {**vars(found), "load": vars(found.load), "total": found.total}
            print(json.dumps(told, indent=1))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title=recipe, title_justify="left", show_header=False)
        for row in planner().rows_of(found):
            table.add_row(*row)
        Console().print(table)
