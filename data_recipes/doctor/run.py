"""From a data file to a report, a quarantine list and a clean copy of it."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from data_recipes.doctor.examine import Examination, Options
from data_recipes.doctor.kinds import KINDS, Finding, reading_kind
from data_recipes.doctor.page import render
from data_recipes.doctor.summary import Summary
from data_recipes.doctor.texts import TextCheck
from data_recipes.formats import Fault, write_jsonl
from data_recipes.tokens import TokenCounter
from vlm.errors import ConfigError
from vlm.messages import Record

PAGE, QUARANTINE, NOTES = "doctor.html", "quarantine.jsonl", "notes.jsonl"


# Streams records, and tells of rows that it passed over; `data_recipes.formats.read` does.
Reader = Callable[[Callable[[Fault], None]], Iterator[Record]]


def doctor(
    read: Reader,
    out: str | os.PathLike[str],
    *,
    title: str,
    processor: TokenCounter | None = None,
    special_tokens: Sequence[str] = (),
    options: Options | None = None,
    clean: str | os.PathLike[str] | None = None,
) -> Summary:
    """Examine data, and write what was found.

    ``doctor.html`` shows it, ``quarantine.jsonl`` has a line ``{"id", "record", "code",
    "reason"}`` for each fault and ``notes.jsonl`` for what is no fault. Each file appears
    whole or not at all; a run that is killed leaves only ``.part`` files, which the next
    one writes over.

    Args:
        read: opens the data; called once more for a clean copy.
        out: folder of the results; made if need be.
        title: what was examined, for the page.
        processor: of the model that will be trained; without one no token is counted.
        special_tokens: of its tokenizer.
        options: how thorough.
        clean: folder for a copy without the records that have a fault; pictures stay where
            they are.

    Raises:
        ConfigError: the folder of the results cannot be written.
        RecordError: the data cannot be read at all, or the clean copy not be written.
    """
    out = Path(out)
    faulty = bytearray()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {
                True: stack.enter_context(_part(out / QUARANTINE)),
                False: stack.enter_context(_part(out / NOTES)),
            }

            def report(finding: Finding) -> None:
                is_fault = KINDS[finding.code].is_fault
                files[is_fault].write(_line(finding))
                if is_fault and finding.number is not None:
                    faulty.extend(bytes(finding.number + 1 - len(faulty)))
                    faulty[finding.number] = 1

            check = TextCheck(processor, special_tokens)
            examination = Examination(check, options or Options(), report)
            summary = examination.run(read(lambda fault: examination.unreadable(_of(fault))))
            for file in files.values():
                _to_disk(file)
        if clean is not None:
            kept = _without(read(lambda fault: None), faulty)
            write_jsonl(kept, Path(clean))
        with _part(out / PAGE) as file:
            file.write(render(summary, title))
            _to_disk(file)
        for name in (QUARANTINE, NOTES, PAGE):
            os.replace(out / f"{name}.part", out / name)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error}); choose another folder") from error
    return summary


def _without(records: Iterator[Record], faulty: bytearray) -> Iterator[Record]:
    for number, record in enumerate(records):
        if number >= len(faulty) or not faulty[number]:
            yield record


def _of(fault: Fault) -> Finding:
    return Finding(reading_kind(fault.code, fault.reason), fault.reason, fault.where)


def _line(finding: Finding) -> str:
    row = {
        "id": finding.id,
        "record": finding.number,
        "code": finding.code,
        "reason": finding.reason,
    }
    return json.dumps(row) + "\n"


def _part(path: Path) -> TextIO:
    return path.with_name(path.name + ".part").open("w", encoding="utf-8", errors="replace")


def _to_disk(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
