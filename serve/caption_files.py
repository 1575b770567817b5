"""Captioning from the command line: a bar while it works, the bad files at the end."""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from serve.progress import captioning
from serve.terminal import printable
from vlm.caption_prompts import CaptionPrompts
from vlm.caption_sources import Items
from vlm.captioning import CaptionResult
from vlm.errors import ConfigError, ErrorLimitError
from vlm.ledger_rows import read_rows

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.ledger import Summary

_MOST_LISTED = 20
_KEYED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Terminated(BaseException):
    """SIGTERM came: end as after Ctrl-C, with the rows that are done."""


def parse_prompts(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """``--prompt`` as typed: one text, or several ``key=text``.

    Raises:
        ConfigError: several of which one has no key, or two have the same.
    """
    if not given:
        return None
    if len(given) == 1:
        return given[0]
    found: dict[str, str] = {}
    for text in given:
        match = _KEYED.fullmatch(text)
        if match is None or match[1] in found:
            raise ConfigError(
                f"--prompt {text!r} needs a key of its own, as there are several; write "
                "--prompt short='...' --prompt long='...'"
            )
        found[match[1]] = match[2]
    return found


def check_source(
    paths: Sequence[str], column: str | None, prompt: str | Mapping[str, str] | None
) -> None:
    """Find the first picture and the words for its prompt, before a model is loaded.

    Raises:
        ConfigError: there is no picture, or a variable of the prompt is not known of it.
        RecordError: the first line of a table is malformed.
    """
    first = next(iter(Items(paths, column)), None)
    if first is None:
        raise ConfigError(f"no picture in {', '.join(paths)}; pass picture files, or their folder")
    if prompt is not None:
        CaptionPrompts(prompt).questions(first.meta)


def caption_files(
    open_model: "Callable[[], Assistant]", paths: Sequence[str], out: str, **options: Any
) -> int:
    """Write captions to the ledger `out` and tell what came of it.

    Args:
        open_model: called once the source is found to hold pictures.
        paths: sources.
        out: the ledger.
        options: of `vlm.caption_job.caption_images`.

    Returns:
        The exit code: 0 for captions, 1 where no picture has one or too many failed, 130
        after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError, RecordError, MessageError, ContextLengthError: as `caption_images`.
    """
    from vlm.caption_job import caption_images

    check_source(paths, options.get("column"), options.get("prompt"))
    assistant = open_model()
    failures: list[str] = []
    written = failed = 0
    code = 0
    summary: Summary | None = None
    total = Items(paths).count() if sys.stderr.isatty() else None
    with captioning(total) as reached, terminated():

        def note(row: CaptionResult) -> None:
            nonlocal written, failed
            written += 1
            if row.error is not None:
                failed += 1
                if len(failures) < _MOST_LISTED:
                    failures.append(row.error)

        try:
            summary = caption_images(
                paths,
                out,
                model=assistant,
                on_result=note,
                on_progress=lambda done, bad: reached(done, bad, written),
                **options,
            )
        except ErrorLimitError as error:
            code, last_words = 1, f"error: {error}"
        except KeyboardInterrupt:
            code, last_words = 130, f"stopped; {out} keeps what is done, the same command goes on"
        except Terminated:
            code, last_words = 143, f"ended by SIGTERM; {out} keeps what is done, run it again"
    _list_failures(failures, failed, out)
    if summary is None:
        print(printable(last_words), file=sys.stderr)
        return code
    return _tell(summary, out)


def _list_failures(failures: Sequence[str], failed: int, out: str) -> None:
    for error in failures:
        print(f"failed: {printable(error)}", file=sys.stderr)
    if failed > len(failures):
        print(f"... and {failed - len(failures):,} more; see {out}", file=sys.stderr)


def _tell(summary: "Summary", out: str) -> int:
    copies = f" ({summary.copied:,} of them copies)" if summary.copied else ""
    print(
        f"{out}: {summary.captioned:,} captioned{copies}, {summary.failed:,} failed, "
        f"{summary.skipped:,} were done before"
    )
    made = summary.exported
    if made is not None and (made.sidecars or made.kept):
        print(f"{made.sidecars:,} text files")
    if made is not None and made.kept:
        print(
            f"{made.kept:,} text files hold another text and were kept; --overwrite replaces them",
            file=sys.stderr,
        )
    for problem in () if made is None else made.problems:
        print(f"failed: {printable(problem)}", file=sys.stderr)
    if not summary.complete:
        return 0  # a shard may have no picture; torchrun would stop the other ranks
    if summary.captioned == 0 and summary.skipped > 0:
        return 0 if any(row["caption"] is not None for _, row in read_rows(out)) else 1
    return 0 if summary.captioned else 1


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM raises `Terminated`, so that what is done is kept and synced."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
