"""`vlm data doctor`: what would break, mislead or waste a training run, told before it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from vlm.errors import ConfigError


def register(app: typer.Typer, package: Callable[[str], ModuleType]) -> None:
    """Add the command; `package` imports a module of the data recipes by its name."""

    @app.command()
    def doctor(
        data: Annotated[str, typer.Argument(help="File, folder, pattern or hf://OWNER/NAME.")],
        model: Annotated[
            str | None, typer.Option(help="That will be trained; the built-in one by default.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("doctor"),
        full: Annotated[bool, typer.Option("--full", help="Decode every picture.")] = False,
        sample: Annotated[
            int, typer.Option(min=0, help="Pictures to decode without --full, about.")
        ] = 1000,
        workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 1,
        images: Annotated[
            Path | None, typer.Option(help="Another folder in which pictures may lie.")
        ] = None,
        from_: Annotated[
            str | None,
            typer.Option("--from", help="See `vlm data list-formats`; found by default."),
        ] = None,
        split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
        clean: Annotated[
            Path | None, typer.Option(help="Folder for a copy without the faulty records.")
        ] = None,
    ) -> None:
        """Examine training data: doctor.html, quarantine.jsonl and notes.jsonl in a folder.

        Exit codes: 0 clean; 1 faults were found; 2 wrong usage.
        """
        from vlm.hub import resolve
        from vlm.processor import Processor

        path = Path(data).resolve()
        if clean is not None and clean.resolve() in (path, path.parent):
            raise ConfigError(f"--clean {clean} is the data's own folder; choose another")
        formats, examiner = package("formats"), package("doctor")

        def read(faults: Any) -> Iterator[Any]:
            found: Iterator[Any] = formats.read(
                data, format=from_, images=images, split=split, faults=faults
            )
            return found

        processor = Processor.from_folder(resolve(model))
        tokens = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
        options = examiner.Options(full=full, sample=sample, workers=workers)
        summary = examiner.doctor(
            read,
            out,
            title=data,
            processor=processor,
            special_tokens=tokens,
            options=options,
            clean=clean,
        )
        print(summary)
        print(out / "doctor.html")
        raise typer.Exit(1 if summary.num_faulty else 0)
