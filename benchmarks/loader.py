"""How long a training step waits for its records, by number of loader workers.

    python benchmarks/loader.py
    python benchmarks/loader.py --scale mid --samples 16 --workers 0 1

`instruct` with LoRA on photo-like JPEG files of 1920x1080, one a sample: the share of the time
that the step loop spends waiting, as the run itself reports it, after the first step (which
waits for the workers to start). One run each, the same weights and samples; the losses must agree.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import SHAPES, write_llava

from train.run import run
from vlm import testing


def write_records(folder: Path, num: int) -> str:
    """Different pictures, a question and an answer each."""
    lines = []
    for number in range(num):
        name = f"{number}.jpg"
        testing.draw_image((1920, 1080), seed=number).save(folder / name, quality=90)
        asked = [{"type": "image"}, {"type": "text", "text": f"what is in picture {number}?"}]
        said = [{"type": "text", "text": "a drawing of something, " * (1 + number % 4)}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"id": str(number), "images": [name], "messages": turns}))
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def train(root: Path, data: str, workers: int) -> list[dict[str, Any]]:
    """The numbers that the run logged, a step each."""
    recipe = {
        "stage": "instruct",
        "output": str(root / f"workers{workers}"),
        "data": [data],
        "model": {"start": str(root / "model")},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.0},
        "learning_rate": 1e-4,
        "batch_size": 4,
        "num_workers": workers,
        "log_steps": 1,
        "save_steps": 10_000,
        "watch": {"samples": 0, "probes": 0},
    }
    path = root / "recipe.yaml"  # JSON is YAML
    path.write_text(json.dumps(recipe))
    output = run(str(path))
    rows = json.loads((output / "history.json").read_text())
    return [row for row in rows if "waiting_share" in row]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SHAPES, default="tiny")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    table = Table(title=f"{options.scale}, {options.samples} samples, {os.cpu_count()} cores")
    for column in ("num_workers", "waiting", "samples/s", "largest loss difference"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_llava(root / "model", options.scale)
        data = write_records(root, options.samples)
        losses: list[float] = []
        for workers in options.workers:
            rows = train(root, data, workers)
            losses = losses or [row["loss"] for row in rows]
            off = max(abs(row["loss"] - loss) for row, loss in zip(rows, losses, strict=True))
            later = rows[1:]
            # Steps are alike in records, so seconds are in proportion to one over the pace.
            seconds = [1 / row["samples_per_second"] for row in later]
            waited = sum(s * row["waiting_share"] for s, row in zip(seconds, later, strict=True))
            pace = len(later) / sum(seconds)
            cells = (f"{waited / sum(seconds):.1%}", f"{pace:.1f}", f"{off:.1g}")
            table.add_row(str(workers), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
