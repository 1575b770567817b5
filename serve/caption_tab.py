"""Captions for many pictures at once: a table that grows, and the same rows as JSONL."""

import json
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from serve.view import ERROR_SIGN, without_folders

REDRAW_SECONDS = 0.3  # every redraw sends the whole table
HEADERS = ["picture", "caption"]

Row = dict[str, str | None]


class Captioned(Protocol):
    """One picture's outcome: a caption, or an error with its code."""

    @property
    def path(self) -> Any:
        """The picture's file."""

    @property
    def caption(self) -> str | None:
        """What the model says."""

    @property
    def error(self) -> str | None:
        """Why there is no caption."""

    @property
    def code(self) -> str | None:
        """The same in one stable word."""


class Captioner(Protocol):
    """What this tab needs of `vlm.assistant.Assistant`."""

    def caption_many(
        self, paths: Iterable[str], *, prompt: str | None = None
    ) -> Iterator[Captioned]:
        """Results in the order of the paths; a bad file is a result too."""


class CaptionJob:
    """The captions that one visitor asked for last."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> "CaptionJob":
        return CaptionJob()

    def stop(self) -> None:
        """End the running job after the pictures in hand."""
        self._stop.set()

    def run(self, model: Captioner, paths: Sequence[str], prompt: str) -> Iterator[list[Row]]:
        """The rows so far, every now and then and at the end."""
        self.stop()
        stop = self._stop = threading.Event()
        rows: list[Row] = []
        drawn = 0.0
        for result in model.caption_many(paths, prompt=prompt.strip() or None):
            rows.append(_row(result))
            if stop.is_set():
                break
            if time.monotonic() - drawn > REDRAW_SECONDS:
                yield rows
                drawn = time.monotonic()
        yield rows


def _row(result: Captioned) -> Row:
    return {
        "file": Path(result.path).name,
        "caption": result.caption,
        "error": without_folders(result.error, [result.path]),
        "code": result.code,
    }


def jsonl(rows: Iterable[Row]) -> str:
    """One JSON object a line: file, and caption or error with its code."""
    kept = ({key: value for key, value in row.items() if value is not None} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)


def add_captions(model: Captioner) -> None:
    """Put the tab's content into the surrounding Blocks."""
    job = gr.State(CaptionJob())
    files = gr.File(
        file_count="multiple", file_types=["image"], label="Pictures", elem_id="pictures"
    )
    prompt = gr.Textbox(
        label="Prompt", placeholder="empty: the model's own captioning prompt", lines=1
    )
    with gr.Row():
        start = gr.Button("Caption all", variant="primary", elem_id="caption-all")
        stop = gr.Button("Stop", elem_id="caption-stop")
    status = gr.Markdown(elem_id="caption-status")
    table = gr.Dataframe(
        headers=HEADERS,
        datatype="str",
        interactive=False,
        wrap=True,
        column_widths=["30%", "70%"],
        buttons=["fullscreen", "copy"],
        elem_id="captions",
        show_label=False,
    )
    download = gr.DownloadButton("Download as JSONL", interactive=False, elem_id="caption-download")

    def run(job: CaptionJob, paths: list[str] | None, prompt: str) -> Iterator[tuple[Any, ...]]:
        if not paths:
            yield job, "Drop some pictures first.", [], gr.update(interactive=False)
            return
        paths = list(dict.fromkeys(paths))  # the same file twice is one
        rows: list[Row] = []
        for rows in job.run(model, paths, prompt):
            yield job, _status(rows, len(paths)), _cells(rows), gr.update(interactive=False)
        done = gr.update(value=_write(rows, download.GRADIO_CACHE), interactive=True)
        yield job, _status(rows, len(paths), ended=True), _cells(rows), done

    start.click(
        run,
        [job, files, prompt],
        [job, status, table, download],
        concurrency_limit=1,
        show_progress="hidden",
        api_name="caption",
        api_visibility="undocumented",
    )
    stop.click(
        CaptionJob.stop, job, queue=False, api_name="caption_stop", api_visibility="undocumented"
    )


def _status(rows: Sequence[Row], total: int, *, ended: bool = False) -> str:
    failed = sum(row["caption"] is None for row in rows)
    bad = f", {failed} could not be used" if failed else ""
    stopped = " Stopped." if ended and len(rows) < total else ""
    return f"{len(rows)} of {total} pictures{bad}.{stopped}"


def _cells(rows: Iterable[Row]) -> list[list[str]]:
    return [
        [row["file"] or "", row["caption"] or f"{ERROR_SIGN} {row['error'] or 'no caption'}"]
        for row in rows
    ]


def _write(rows: Iterable[Row], cache: str) -> str:
    """A file under the server's own folder, in a folder whose name cannot be guessed."""
    Path(cache).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=cache)) / "captions.jsonl"
    path.write_text(jsonl(rows), encoding="utf-8")
    return str(path)
