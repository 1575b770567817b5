"""What remains of a run besides the model: its curve, its numbers, how it was made."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "pillow")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """``manifest.json``: versions, data, stage table, steps and time of the run."""
    manifest = {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


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
