"""`vlm data doctor`: what would break, mislead or waste a training run, told before it."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from vlm.errors import ConfigError


def register(app: typer.Typer, open_doctor: Callable[[], ModuleType]) -> None:
    """Add the command; `open_doctor` imports the package that examines, when it is needed."""

    @app.command()
    def doctor(
        data: Annotated[Path, typer.Argument(help="Folder with records.jsonl, or a .jsonl file.")],
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
        clean: Annotated[
            Path | None, typer.Option(help="Folder for a copy without the faulty records.")
        ] = None,
    ) -> None:
        """Examine training data: doctor.html, quarantine.jsonl and notes.jsonl in a folder.

        Exit codes: 0 clean; 1 faults were found; 2 wrong usage.
        """
        from vlm.hub import resolve
        from vlm.processor import Processor

        path = data / "records.jsonl" if data.is_dir() else data
        if clean is not None and clean.resolve() == path.parent.resolve():
            raise ConfigError(f"--clean {clean} is the data's own folder; choose another")
        package = open_doctor()
        read = package.jsonl(path, images)
        processor = Processor.from_folder(resolve(model))
        tokens = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
        options = package.Options(full=full, sample=sample, workers=workers)
        summary = package.doctor(
            read,
            out,
            title=str(path),
            processor=processor,
            special_tokens=tokens,
            options=options,
            clean=clean,
        )
        print(summary)
        print(out / "doctor.html")
        raise typer.Exit(1 if summary.num_faulty else 0)
