"""How long until the first answer: `vlm ask` and `vlm --help` beside `import torch`.

    python benchmarks/startup.py

Whole processes, started in turn (one of each per round, so that a busy machine slows all of
them alike); the figures are ratios of the medians to that of ``python -c "import torch"``.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_recipes.scenes import draw_scene, make_scene

VLM = [sys.executable, "-c", "from serve.cli import main; main()"]


def seconds(command: list[str]) -> float:
    """Wall-clock time of one process; it must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "scene.png"
        draw_scene(make_scene(0, 0, split="test")[0]).save(picture)
        commands = {
            'python -c "import torch"': [sys.executable, "-c", "import torch"],
            "vlm --help": [*VLM, "--help"],
            "vlm ask (built-in model)": [*VLM, "ask", str(picture), "how many objects are there?"],
        }
        for command in commands.values():
            seconds(command)  # files into the page cache, bytecode onto the disk
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in track(range(rounds), description="rounds"):
            for name, command in commands.items():
                times[name].append(seconds(command))
    table = Table(title=f"whole processes, median of {rounds}")
    for column in ("command", "seconds", "ratio to import torch"):
        table.add_column(column, justify="left" if column == "command" else "right")
    base = statistics.median(next(iter(times.values())))
    for name, taken in times.items():
        middle = statistics.median(taken)
        table.add_row(name, f"{middle:.2f}", f"{middle / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
