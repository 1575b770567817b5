"""A photo's way to normalised pixels: this package beside transformers' PIL processor.

    python benchmarks/preprocessing.py

Drawn pictures of 1920x1080, smooth and noisy, as JPEG files of quality 90, to 224
pixels. Each way reads the file, decodes, resizes, crops and normalises, in turn on one
thread; errors are in levels of 8 bits. ``exact`` and ``box`` decode in full, and ``box``
resizes only what the crop keeps; ``draft``, the default, lets the JPEG decoder skip detail
that the resizing would throw away, too. Whether captions change:
``benchmarks/preprocessing_captions.py``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from transformers import CLIPImageProcessorPil

from vlm import testing
from vlm.images import load_image
from vlm.pixels import Preprocessing, fit, level_table

SIZE, TARGET = (1920, 1080), 224


def pictures(folder: Path) -> dict[str, Path]:
    """A smooth and a noisy JPEG, and the noisy one upright."""
    smooth = testing.draw_image(SIZE, seed=5).filter(ImageFilter.GaussianBlur(20))
    noise = np.random.default_rng(0).normal(0, 30, (SIZE[1], SIZE[0], 3))
    noisy = Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8))
    upright = noisy.transpose(Image.Transpose.ROTATE_90)
    made = {"smooth": smooth, "noisy": noisy, "noisy, 1080x1920": upright}
    paths = {kind: folder / f"{i}.jpg" for i, kind in enumerate(made)}
    for kind, picture in made.items():
        picture.save(paths[kind], quality=90)
    return paths


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    square = {"height": TARGET, "width": TARGET}
    processor = CLIPImageProcessorPil(size={"shortest_edge": TARGET}, crop_size=square)
    table = level_table(processor)
    assert table is not None

    def theirs(path: Path) -> np.ndarray:
        picture = Image.open(path).convert("RGB")
        return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])

    def ours(path: Path, way: Preprocessing) -> np.ndarray:
        picture = load_image(path, draft_to=2 * TARGET if way == "draft" else None)
        fitted = fit(processor, picture.pixels, exact=way == "exact")
        values = np.asarray(fitted).transpose(2, 0, 1)
        return np.stack([table[c][values[c]] for c in range(3)])

    ways: dict[str, Callable[[Path], np.ndarray]] = {
        "transformers": theirs,
        "vlm, exact": lambda path: ours(path, "exact"),
        "vlm, box": lambda path: ours(path, "box"),
        "vlm, draft": lambda path: ours(path, "draft"),
    }
    report = Table(title=f"{SIZE[0]}x{SIZE[1]} JPEG to {TARGET}, median of {rounds}")
    for column in ("picture", "way", "ms", "speed", "largest error", "mean error"):
        report.add_column(column, justify="left" if column in ("picture", "way") else "right")
    with tempfile.TemporaryDirectory() as name:
        for kind, path in pictures(Path(name)).items():
            times: dict[str, list[float]] = {way: [] for way in ways}
            found: dict[str, np.ndarray] = {}
            for _ in range(rounds):
                for way, run in ways.items():
                    started = time.perf_counter()
                    found[way] = run(path)
                    times[way].append(time.perf_counter() - started)
            base = statistics.median(times["transformers"])
            deviation = np.array(processor.image_std)[:, None, None]
            for way, taken in times.items():
                middle = statistics.median(taken)
                levels = 255 * np.abs(found[way] - found["transformers"]) * deviation
                report.add_row(
                    kind,
                    way,
                    f"{1000 * middle:.1f}",
                    f"{base / middle:.2f}",
                    f"{levels.max():.1f}",
                    f"{levels.mean():.3f}",
                )
    Console().print(report)


if __name__ == "__main__":
    main()
