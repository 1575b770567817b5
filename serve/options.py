"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.processor import Processor

Model = Annotated[
    str | None,
    typer.Option(help="A LLaVA folder or a hub id; the built-in model by default."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Quantize = Annotated[
    Literal["4bit", "8bit"] | None, typer.Option(help="Of the language model's linear layers.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile decode steps: slower to start, meant for GPUs.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]

AnyData = Annotated[str, typer.Argument(help="A file, folder, pattern or hf://OWNER/NAME.")]
FormatName = Annotated[
    str | None, typer.Option("--from", help="See `vlm data list-formats`; found by default.")
]
Pictures = Annotated[Path | None, typer.Option(help="Another folder in which pictures may lie.")]
Split = Annotated[str | None, typer.Option(help="Of a data set that has several.")]
SkipFaults = Annotated[
    bool, typer.Option("--skip-faults", help="Pass over bad rows; list them in faults.jsonl.")
]


def open_model(
    model: str | None,
    device: str,
    dtype: str,
    quantize: Literal["4bit", "8bit"] | None = None,
    compile: bool = False,
) -> "Assistant":
    """The model of a command; imports torch. What is compiled is told on standard error."""
    from vlm.assistant import load

    if compile:
        tell_compiling()
    return load(model, device=device, dtype=dtype, quantize=quantize, compile=compile)


def open_processor(model: str | None) -> "Processor":
    """The processor of a model, whose weights are neither fetched nor read."""
    from vlm.hub import resolve
    from vlm.processor import Processor

    return Processor.from_folder(resolve(model, weights=False))


def tell_compiling() -> None:
    """Let `vlm.engine.compiled` tell what it compiles, and how long that took."""
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    log = logging.getLogger("vlm.engine.compiled")
    log.setLevel(logging.INFO)
    log.addHandler(RichHandler(console=Console(stderr=True), show_path=False))
