"""`vlm data doctor`: what would break, mislead or waste a training run, told before it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from serve.options import AnyData, FormatName, Pictures, Split, open_processor
from vlm.errors import ConfigError


def register(app: typer.Typer, package: Callable[[str], ModuleType]) -> None:
    """Add the command; `package` imports a module of the data recipes by its name."""

    @app.command()
    def doctor(
        data: AnyData,
        model: Annotated[
            str | None, typer.Option(help="That will be trained; the built-in one by default.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("doctor"),
        full: Annotated[bool, typer.Option("--full", help="Decode every picture.")] = False,
        sample: Annotated[
            int, typer.Option(min=0, help="Pictures to decode without --full, about.")
        ] = 1000,
        workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 1,
        images: Pictures = None,
        from_: FormatName = None,
        split: Split = None,
        clean: Annotated[
            Path | None, typer.Option(help="Folder for a copy without the faulty records.")
        ] = None,
    ) -> None:
        """Examine training data: doctor.html, quarantine.jsonl and notes.jsonl in a folder.

        Exit codes: 0 clean; 1 faults were found; 2 wrong usage.
        """
        path = Path(data).resolve()
        if clean is not None and clean.resolve() in (path, path.parent):
            raise ConfigError(f"--clean {clean} is the data's own folder; choose another")
        formats, examiner = package("formats"), package("doctor")

        def read(faults: Any) -> Iterator[Any]:
            found: Iterator[Any] = formats.read(
                data, format=from_, images=images, split=split, faults=faults
            )
            return found

        processor = open_processor(model)
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
