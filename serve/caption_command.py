"""`vlm caption`: pictures of any source into a ledger, and files made from it."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve.options import Compile, tell_compiling
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from vlm.assistant import Assistant


def register(app: typer.Typer) -> None:
    """Add the command to the `vlm` command."""
    app.command()(caption)


def caption(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Pictures, folders, patterns, .txt lists, .jsonl, .csv, .parquet, .tar shards."
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="JSONL file; a run that was cut short goes on.")
    ] = "captions.jsonl",
    model: Annotated[
        str | None, typer.Option(help="A folder or a hub id; the built-in model by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 32,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of the model's own; may hold {name}, {directory} and columns such as "
            "{tags}. Several as KEY=TEXT give several captions."
        ),
    ] = None,
    prefix: Annotated[str, typer.Option(help="Before each caption.")] = "",
    suffix: Annotated[str, typer.Option(help="After each caption.")] = "",
    include: Annotated[
        list[str] | None, typer.Option(help="A word to expect; rows tell where it is missing.")
    ] = None,
    discourage: Annotated[
        list[str] | None,
        typer.Option(help="A word to keep out; rows tell where it came up all the same."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest caption, in tokens.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="With the picture, in tables; found by itself by default.")
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option(help="Try pictures again that failed before.")
    ] = False,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="End with code 1 once more pictures have failed.")
    ] = None,
    sidecar: Annotated[bool, typer.Option(help="Write a.txt beside a.jpg.")] = False,
    sidecar_to: Annotated[
        str | None, typer.Option(help="The same in a folder that mirrors the pictures'.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Let sidecars replace .txt files that hold another text.")
    ] = False,
    csv: Annotated[str | None, typer.Option(help="Write a table of all captions.")] = None,
    parquet: Annotated[str | None, typer.Option(help="The same as Parquet.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Join the parts that ranks left beside --out.")
    ] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: workers on this machine or a cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of Ray, each with the model; by default one a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    quantize: Annotated[
        Literal["4bit", "8bit"] | None, typer.Option(help="Of the language model's linear layers.")
    ] = None,
    compile: Compile = False,
) -> None:
    """Caption pictures into a JSONL file, one line each; bad files are listed at the end.

    Exit codes: 0 captions were written; 1 no picture has one, or more than --max-errors
    failed; 2 wrong usage; 130 after Ctrl-C and 143 after SIGTERM, and the same command goes on.
    """
    from pathlib import Path

    if sidecar and sidecar_to is not None:
        raise ConfigError("--sidecar and --sidecar-to exclude each other; choose one")
    exports: dict[str, Any] = {
        "sidecar": "beside" if sidecar else sidecar_to,
        "csv": csv,
        "parquet": parquet,
        "overwrite": overwrite,
    }
    if merge:
        if paths:
            raise ConfigError("--merge takes no pictures, only --out; run without it to caption")
        from vlm.caption_export import export_captions
        from vlm.caption_ranks import merge as join

        print(f"{out}: {join(Path(out)):,} rows")
        export_captions(out, **exports)
        return
    if not paths:
        raise typer.BadParameter("name pictures, or their folder", param_hint="PATHS")
    from serve.caption_files import caption_files, parse_prompts
    from vlm.caption_ranks import device_of_rank, ranks_of_environment

    ranks = ranks_of_environment()
    if workers is not None and engine != "ray":
        raise ConfigError(f"--workers {workers} is for --engine ray; leave it out")
    if engine == "ray":
        from vlm.caption_ray import RayEngine

        if ranks[1] > 1:
            raise ConfigError("--engine ray shares pictures itself; start it without a launcher")
        opening = {"device": device, "dtype": dtype, "quantize": quantize, "compile": compile}
        exports["engine"] = RayEngine(model, workers, opening)

    def open_model() -> "Assistant":
        if engine == "ray":
            from vlm.caption_ray import describe_model

            return describe_model(model)  # type: ignore[return-value]
        from vlm.assistant import load

        if compile:
            tell_compiling()
        place = device_of_rank(device, ranks[1])
        return load(model, device=place, dtype=dtype, quantize=quantize, compile=compile)

    code = caption_files(
        open_model,
        paths,
        out,
        batch_size=batch_size,
        prompt=parse_prompts(prompt),
        prefix=prefix,
        suffix=suffix,
        include=include or (),
        discourage=discourage or (),
        max_new_tokens=max_new_tokens,
        column=column,
        retry_errors=retry_errors,
        max_errors=max_errors,
        ranks=ranks,
        **exports,
    )
    raise typer.Exit(code)
