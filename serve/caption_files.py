"""Captioning from the command line: a bar while it works, the bad files at the end."""

import json
import sys
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from serve.progress import counting
from serve.terminal import printable
from vlm.captioning import CaptionResult, expand_paths
from vlm.errors import ConfigError
from vlm.ledger import caption_to_ledger

if TYPE_CHECKING:
    from vlm.assistant import Assistant

_MOST_LISTED = 20


def find_files(paths: Sequence[str]) -> list[str]:
    """All files of files and folders.

    Raises:
        ConfigError: there is none.
    """
    files = list(expand_paths(paths))
    if not files:
        raise ConfigError(f"no picture in {', '.join(paths)}; pass picture files, or their folder")
    return files


def caption_files(
    assistant: "Assistant",
    files: Sequence[str],
    out: str,
    *,
    batch_size: int = 16,
    prompt: str | None = None,
    retry_errors: bool = False,
) -> bool:
    """Write captions to the ledger `out` and tell what came of it.

    Returns:
        False when not one of the files has a caption, in this run or an earlier one.

    Raises:
        ConfigError, RecordError, MessageError, ContextLengthError: as `caption_to_ledger`.
    """
    places = {path: place for place, path in enumerate(files, 1)}
    failures: list[CaptionResult] = []
    with counting("captioning", len(files)) as reached:

        def note(row: CaptionResult) -> None:
            reached(places[row.path])
            if row.error is not None:
                failures.append(row)

        summary = caption_to_ledger(
            assistant,
            files,
            out,
            batch_size=batch_size,
            prompt=prompt,
            retry_errors=retry_errors,
            on_row=note,
        )
    for row in failures[:_MOST_LISTED]:
        print(f"failed: {printable(str(row.error))}", file=sys.stderr)
    if len(failures) > _MOST_LISTED:
        print(f"... and {len(failures) - _MOST_LISTED:,} more; see {out}", file=sys.stderr)
    print(
        f"{out}: {summary.captioned:,} captioned, {summary.failed:,} failed, "
        f"{summary.skipped:,} were done before"
    )
    return summary.captioned > 0 or (summary.skipped > 0 and _has_caption(out, places))


def _has_caption(ledger: str, paths: Container[str]) -> bool:
    with open(ledger, encoding="utf-8") as file:
        rows = (json.loads(line) for line in file)
        return any(row["caption"] is not None and row["path"] in paths for row in rows)
