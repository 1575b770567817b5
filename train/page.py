"""``report.html``: a run on one page that needs no other file and no network."""

import base64
import functools
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import TrainerState

from train.charts import HEIGHT, WIDTH, Chart, Point, draw
from train.config import RunConfig
from train.gallery import Answered
from train.probes import verdict
from train.stages import PartReport
from vlm.errors import ImageError
from vlm.history import stamp
from vlm.images import load_image
from vlm.scoring import is_correct

FILE = "report.html"  # in a run's output folder
_THUMBNAIL = (320, 320)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as a ``data:`` URI, or why there is none."""

    name: str
    uri: str | None
    error: str = ""


@dataclass(frozen=True)
class Stretch:
    """Steps at which the model gave the same answer."""

    steps: str
    answer: str
    error: str | None
    right: bool


@dataclass(frozen=True)
class Sample:
    """A question, and its answers over time."""

    question: str
    expected: str
    pictures: tuple[Thumbnail, ...]
    stretches: tuple[Stretch, ...]


def write_page(
    config: RunConfig,
    parts: Sequence[PartReport],
    state: TrainerState,
    answers: Sequence[Answered],
    counts: Mapping[str, int],
) -> None:
    """Write the page into the run's output folder, whole or not at all.

    Args:
        config: of the run.
        parts: what trains.
        state: how far it has come, with its history.
        answers: of `train.gallery`, the oldest first.
        counts: samples by the name of their data set.
    """
    history = state.log_history
    text = _template().render(
        title=f"{config.stage}: {Path(config.output).name}",
        config=config,
        recipe=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        parts=parts,
        counts=counts,
        state=state,
        figures=_figures(history),
        verdict=_verdict(history),
        charts=charts(history),
        width=WIDTH,
        height=HEIGHT,
        samples=samples(answers),
        **stamp(),
    )
    output = Path(config.output)
    aside = output / f"{FILE}.tmp"
    aside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(aside, output / FILE)


def charts(history: Sequence[Row]) -> list[Chart]:
    """What a run's history has to show; a chart without points is left out."""
    norms = {"all": "grad_norm", **_parts(history, "grad_norm_")}
    rates = _parts(history, "learning_rate_") or {"all": "learning_rate"}
    probes = {"right picture": "probe_right", "blank": "probe_blank", "another": "probe_other"}
    asked: list[tuple[str, dict[str, str]]] = [
        ("Loss", {"training": "loss", "held out": "eval_loss"}),
        ("Sight probes: loss a token", probes),
        ("Gradient norm before clipping", norms if len(norms) > 2 else {"all": "grad_norm"}),
        ("Learning rate", rates),
        ("Samples a second", {"samples": "samples_per_second"}),
        ("Tokens a second", {"tokens": "tokens_per_second"}),
    ]
    drawn = (
        draw(title, {label: _points(history, key) for label, key in keys.items()})
        for title, keys in asked
    )
    return [chart for chart in drawn if chart is not None]


def samples(answers: Iterable[Answered]) -> list[Sample]:
    """The questions in the order of their first asking; equal answers in a row are one."""
    questions: dict[tuple[Any, ...], list[Answered]] = {}
    for each in answers:
        questions.setdefault((each.id, each.images, each.question), []).append(each)
    return [
        Sample(
            given[0].question,
            given[0].expected,
            tuple(map(_thumbnail, given[0].images)),
            tuple(
                _stretch(list(same))
                for _, same in groupby(given, key=lambda each: (each.answer, each.error))
            ),
        )
        for given in questions.values()
    ]


def _stretch(same: Sequence[Answered]) -> Stretch:
    first, last = same[0], same[-1]
    steps = f"{first.step:,}" if first.step == last.step else f"{first.step:,}–{last.step:,}"
    right = first.error is None and is_correct(first.answer, first.expected)
    return Stretch(steps, first.answer, first.error, right)


@functools.lru_cache(256)
def _thumbnail(path: str) -> Thumbnail:
    name = Path(path).name
    try:
        small = load_image(path, draft_to=_THUMBNAIL[0]).pixels.copy()
    except ImageError as error:
        return Thumbnail(name, None, str(error))
    small.thumbnail(_THUMBNAIL)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=90)
    return Thumbnail(name, "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())


def _points(history: Sequence[Row], key: str) -> list[Point]:
    rows = ((row["step"], float(row[key])) for row in history if key in row)
    return [(step, value) for step, value in rows if math.isfinite(value)]


def _parts(history: Sequence[Row], prefix: str) -> dict[str, str]:
    """The parts that have a number of this name: label to key."""
    keys = dict.fromkeys(key for row in history for key in row if key.startswith(prefix))
    return {key.removeprefix(prefix).replace("_", " "): key for key in keys}


def _verdict(history: Sequence[Row]) -> str | None:
    found = [row for row in history if "probe_right" in row]
    return verdict(found[-1]) if found else None


def _figures(history: Sequence[Row]) -> list[tuple[str, str]]:
    """The newest of the numbers that matter most."""
    asked = (
        ("training loss", "loss", "{:.4f}"),
        ("held-out loss", "eval_loss", "{:.4f}"),
        ("samples/s", "samples_per_second", "{:,.1f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
        ("padding", "padding_share", "{:.0%}"),
        ("waiting for data", "waiting_share", "{:.0%}"),
    )
    found = ((label, shape, _points(history, key)) for label, key, shape in asked)
    return [(label, shape.format(points[-1][1])) for label, shape, points in found if points]


@functools.cache
def _template() -> Any:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(FILE)
