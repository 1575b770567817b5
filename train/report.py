"""What remains of a run besides the model: its curve, its numbers, how it was made."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from train.config import RunConfig
from train.dataset import RecordDataset
from train.stages import PartReport
from vlm.history import Run, read_history, stamp


def run_record(
    config: RunConfig,
    data: RecordDataset,
    report: Sequence[PartReport],
    history: Sequence[Mapping[str, Any]],
    *,
    steps: int,
    num_processes: int,
    seconds: float,
) -> Run:
    """The run's entry in the record of its model; see `vlm.history`."""
    losses = {"training": _last(history, "loss"), "held_out": _last(history, "eval_loss")}
    return {
        "stage": config.stage,
        "config": _values(config),
        "data": {"files": config.data, "records": len(data), "sha256": data.fingerprint()},
        "parts": [vars(line) for line in report],
        "steps": steps,
        "num_processes": num_processes,
        "seconds": round(seconds, 1),
        "losses": losses,
        **stamp(),
    }


def is_result(folder: Path, config: RunConfig) -> bool:
    """Whether the newest run in the folder's record is this one.

    Raises:
        CheckpointError: the folder's vlm.json is malformed.
    """
    last = next(reversed(read_history(folder)), {})
    told = {"stage": last.get("stage"), "data": last.get("data", {}).get("files")}
    try:  # as a recipe: a record of an older version lacks the keys that came later
        return RunConfig.model_validate({**last.get("config", {}), **told}) == config
    except ValidationError:
        return False


def _values(config: RunConfig) -> dict[str, Any]:
    """The recipe's values that have no place of their own in the record."""
    return config.model_dump(mode="json", exclude={"stage", "data"})


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The last finite value; JSON has no NaN."""
    values = [float(row[key]) for row in history if key in row]
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def write_curves(folder: Path, stage: str, history: Sequence[Mapping[str, Any]]) -> None:
    """``history.json`` and ``curves.png``: training and held-out loss over the steps."""
    (folder / "history.json").write_text(json.dumps(list(history)) + "\n", encoding="utf-8")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(title=f"stage {stage}", xlabel="optimiser steps", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
