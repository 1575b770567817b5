"""How much of the reading of pictures is hidden behind the model, and what that gains.

    python benchmarks/caption_overlap.py

A folder of big JPEG files, captioned in one process in two ways that must say the same:
every file read and prepared one after the other and then the model, or, as this package
does, read ahead in threads while the model runs. The parts are timed on their own, too: of
the reading time, hidden is what the second way saves. The model's kernels run on ``--threads``
cores, the readers on what is left of the machine: where that is nothing, because others use it,
wall times show no gain, so processor times stand beside them: of the thread that runs the model,
which is what a free second core leaves to be waited for, and of all threads, with ``--threads 1``.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes import write_llava

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.caption_items import Item, file_item
from vlm.caption_pipeline import results
from vlm.caption_prompts import CaptionPrompts
from vlm.caption_reading import Reader

PROMPTS = CaptionPrompts("describe.")
BATCH = 16
CLOCKS = ("wall", "processor, model's thread", "processor, all threads")
Times = tuple[float, float, float]


def clocks() -> Times:
    """The three `CLOCKS` now."""
    return time.perf_counter(), time.thread_time(), time.process_time()


def since(began: Times) -> Times:
    """What they have moved since."""
    wall, thread, process = clocks()
    return wall - began[0], thread - began[1], process - began[2]


def write_photos(folder: Path, number: int, size: tuple[int, int]) -> list[Item]:
    """Drawings under smooth noise, as busy as a photo to a JPEG decoder."""
    for seed in range(number):
        torch.manual_seed(seed)
        small = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=torch.uint8)
        noise = Image.fromarray(small.numpy()).resize(size, Image.Resampling.BICUBIC)
        picture = Image.blend(testing.draw_image(size, seed=seed), noise, 0.3)
        picture.save(folder / f"{seed:04}.jpg", quality=90)
    return [file_item(str(path)) for path in sorted(folder.glob("*.jpg"))]


class Ways:
    """Both ways and their parts.

    Args:
        assistant: does the work.
        items: the files.
        tokens: of each caption.
    """

    def __init__(self, assistant: Assistant, items: list[Item], tokens: int) -> None:
        self.assistant, self.items = assistant, items
        self.sampling = {"max_new_tokens": tokens, "stop_loops": False}
        self.reading: list[Times] = []

    def ahead(self) -> list[str]:
        """Read in threads while the model runs."""
        found = results(self.assistant, self.items, PROMPTS, BATCH, self.sampling)
        return [result.caption or "" for result in found]

    def one_after_the_other(self) -> list[str]:
        """Read all, then run the model."""
        started = clocks()
        read = Reader(self.assistant, PROMPTS, self.sampling, None)
        requests = [each for item in self.items for each in read(item).requests.values()]
        self.reading.append(since(started))
        return [answer.text for answer in self.assistant.run_all(requests, BATCH)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=[3000, 2000])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        assistant = load(write_llava(Path(name) / "model", options.scale))
        (Path(name) / "photos").mkdir()
        items = write_photos(Path(name) / "photos", options.pictures, tuple(options.size))
        ways = Ways(assistant, items, options.tokens)
        called: dict[str, Callable[[], list[str]]] = {
            "one after the other": ways.one_after_the_other,
            "read ahead in threads": ways.ahead,
        }
        times: dict[str, list[Times]] = {way: [] for way in called}
        said: dict[str, list[str]] = {}
        for number in range(options.rounds + 1):
            for way, call in called.items():
                assistant.engine.cache.clear()
                assistant.engine.prefixes.clear()
                began = clocks()
                said[way] = call()
                if number:  # the first round is not counted
                    times[way].append(since(began))
    assert len(set(map(tuple, said.values()))) == 1, "the two ways say different things"
    distinct = len(set(said["one after the other"]))
    title = f"{options.scale}, {len(items)} files of {options.size[0]}x{options.size[1]}, "
    title += f"{options.threads} of {os.cpu_count()} cores for the model, "
    title += f"{distinct} different captions"
    Console().print(report(title, times, ways.reading[1:]))


def report(title: str, times: dict[str, list[Times]], reading: list[Times]) -> Table:
    """Medians, the ratio of the two ways, and the share of the reading that is hidden."""
    table = Table(title=title)
    for column in ("seconds", *CLOCKS):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    rows = [*times.items(), ("reading alone", reading)]
    middle = {
        name: [statistics.median(c) for c in zip(*taken, strict=True)] for name, taken in rows
    }
    for name, values in middle.items():
        table.add_row(name, *(f"{value:.2f}" for value in values))
    serial, ahead, alone = middle.values()
    table.add_row("ratio", *(f"{a / b:.2f}" for a, b in zip(serial, ahead, strict=True)))
    hidden = [100 * (a - b) / c for a, b, c in zip(serial, ahead, alone, strict=True)]
    table.add_row("of the reading, hidden", *(f"{share:.0f} %" for share in hidden[:2]), "")
    return table


if __name__ == "__main__":
    main()
