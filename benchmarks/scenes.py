"""How fast scenes are drawn: pictures a second on one core, and what a PNG file costs beside it.

    python benchmarks/scenes.py

The peer is Pillow itself, encoding a picture of the same size as PNG at its fastest level:
the least that any data set of files on disk must pay.
"""

import argparse
import io
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from data_recipes.scenes import draw_scene, make_scene
from data_recipes.scenes.dialogues import instruct


def rate(work: Callable[[int], object], num: int) -> float:
    """Calls a second over ``num`` calls."""
    start = time.perf_counter()
    for index in range(num):
        work(index)
    return num / (time.perf_counter() - start)


def main() -> None:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=5000, help="pictures")
    num = parser.parse_args().num
    scenes = [make_scene(0, index) for index in range(num)]
    pictures = [draw_scene(scene) for scene, _ in scenes]  # sprites are cached from here on

    def encode(index: int) -> None:
        pictures[index].save(io.BytesIO(), "png", compress_level=1)

    steps: dict[str, Callable[[int], object]] = {
        "encode a PNG (Pillow)": encode,
        "draw a scene": lambda index: draw_scene(scenes[index][0]),
        "six questions and answers": lambda index: instruct(*scenes[index], 6),
    }
    table = Table(title=f"{num} scenes of 96 x 96, one core, one run")
    table.add_column("step")
    table.add_column("a second", justify="right")
    table.add_column("ratio to encoding", justify="right")
    rates = {name: rate(work, num) for name, work in steps.items()}
    base = rates["encode a PNG (Pillow)"]
    for name, value in rates.items():
        table.add_row(name, f"{value:,.0f}", f"{value / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
