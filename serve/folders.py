"""The `vlm` commands about model folders: compose, import, inspect, merge, push."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from vlm.inspection import Inspection, Part, Piece

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto is what the folder has."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `vlm` command."""
    for command in (compose, inspect, merge, push):
        app.command()(command)
    app.command("import")(import_)


def compose(
    vision: Annotated[str, typer.Option(help="CLIP, SigLIP or DINOv2: a folder or a hub id.")],
    language: Annotated[str, typer.Option(help="Any decoder-only LLM: a folder or a hub id.")],
    out: Out,
    projector: Annotated[str, typer.Option(help="mlp or linear.")] = "mlp",
    feature_layer: Annotated[
        str, typer.Option(help="Whose states are visual tokens; several: -8,-2")
    ] = "-2",
    select: Annotated[
        Literal["auto", "default", "full"],
        typer.Option(help="auto: the patches; full: the class token too."),
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="In pixels; by default the tower's preprocessing's.")
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Join a vision tower and a language model by a new projector, ready for `vlm train`."""
    check_new(out)
    layers = parse_layers(feature_layer)
    from rich.console import Console

    from vlm.checkpoint import compose as join
    from vlm.checkpoint import save_checkpoint
    from vlm.inspection import facts_of, parts_of
    from vlm.portability import transformers_differences

    model, processor = join(
        vision,
        language,
        projector,
        layers,
        None if select == "auto" else select,
        _dtype(dtype),
        image_size,
    )
    save_checkpoint(model, processor, out)
    console = Console()
    console.print(part_table(str(out), parts_of(model)))
    print_facts(facts_of(model, processor))
    for reason in transformers_differences(model):
        print(f"not for plain transformers: {reason}")
    print("next: train the projector (stage align); until then its answers are noise")


def inspect(
    folder: Annotated[str, typer.Argument(help="A model or adapter folder, or a hub id.")],
) -> None:
    """Show what a model folder holds, how it is prompted, and every problem found.

    Exit code 1 tells that there are problems.
    """
    from rich.console import Console

    from vlm.hub import resolve
    from vlm.inspection import inspect_folder

    found = inspect_folder(resolve(folder))
    if found.parts:
        Console().print(part_table(f"{folder} ({found.state})", found.parts))
        print_facts(found.facts)
        print_example(found.example)
        print_readers(found)
        print_training(found.training)
    for problem in found.problems:
        print("problem:", " ".join(problem.split()))
    raise typer.Exit(1 if found.problems else 0)


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder with adapter and projector.")],
    out: Out,
    dtype: Dtype = "auto",
) -> None:
    """Write an adapter and its base model as one plain folder."""
    check_new(out)
    from vlm.checkpoint import load_checkpoint, save_checkpoint
    from vlm.folder import is_adapter
    from vlm.hub import resolve

    if not is_adapter(resolve(adapter)):
        raise ConfigError(f"{adapter}: no adapter in it, so there is nothing to merge")
    model, processor = load_checkpoint(adapter, dtype=_dtype(dtype))
    save_checkpoint(model, processor, out)
    print(out)


def import_(
    old: Annotated[str, typer.Argument(help="Of the original LLaVA repository: folder or hub id.")],
    out: Out,
    vision: Annotated[
        str | None, typer.Option(help="Its tower, where the one that it names is not to be had.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Its base model, for a projector or an adapter alone.")
    ] = None,
) -> None:
    """Convert a checkpoint of the original LLaVA repository into a standard folder."""
    check_new(out)
    from vlm.original import import_original

    for fact in import_original(old, out, vision=vision, language=language):
        print(fact)


def push(
    folder: Annotated[Path, typer.Argument(help="A model or adapter folder.")],
    repo: Annotated[str, typer.Argument(help="On the hub: org/name.")],
    private: Annotated[bool, typer.Option(help="If the repository is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if absent.")] = None,
) -> None:
    """Upload a model folder to the Hugging Face hub; log in first with `hf auth login`."""
    from vlm.publish import push as upload

    print(upload(folder, repo, private=private, revision=revision))


def check_new(out: Path) -> None:
    """Raise ConfigError if `out` holds anything: a folder is never written over."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: it exists already; name a new folder, or remove it first")


def parse_layers(text: str) -> int | list[int]:
    """``"-2"`` to -2, ``"-8,-2"`` to [-8, -2].

    Raises:
        ConfigError: not whole numbers.
    """
    try:
        layers = [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--feature-layer {text!r}: give a whole number such as -2, or several: -8,-2"
        ) from error
    return layers if len(layers) > 1 else layers[0]


def part_table(title: str, parts: "list[Part]") -> "Table":
    """Parts, classes, dtypes, parameters."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("part", "class", "dtype"):
        table.add_column(column, no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for part in parts:
        table.add_row(part.name, part.kind, part.dtype, f"{part.num_parameters:,}")
    return table


def print_facts(facts: dict[str, str]) -> None:
    """Names and values, one to a line."""
    for name, value in facts.items():
        print(f"{name}: {value}")


def print_example(pieces: "list[Piece]") -> None:
    """The example with what training learns in green and in angle quotes."""
    from rich.console import Console
    from rich.text import Text

    line = Text()
    for piece in pieces:
        line.append(f"«{piece.text}»" if piece.learnt else piece.text, "green" * piece.learnt)
    print("an example as training sees it, what is learnt in «»:")
    Console(soft_wrap=True).print(line)


def print_readers(found: "Inspection") -> None:
    """What other programs make of the folder."""
    for reader, reasons in (
        ("transformers", found.transformers),
        ("vLLM, by its source", found.vllm),
    ):
        print(f"{reader}: {'; '.join(reasons) or 'opens it as it is'}")


def print_training(runs: "Sequence[Mapping[str, Any]]") -> None:
    """The runs that made the model, one to a line."""
    for run in runs:
        told = [
            f"{run[key]} {unit}"
            for key, unit in (("steps", "steps"), ("seconds", "s"))
            if key in run
        ]
        print(f"made by: {run.get('stage', 'a run')}", *told, sep=", ")


def _dtype(name: str) -> Any:
    from vlm.device import DTYPES

    return DTYPES.get(name)
