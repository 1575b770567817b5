"""Peak memory of captioning runs of 1,000, 10,000 and 100,000 pictures.

    python benchmarks/caption_memory.py
    python benchmarks/caption_memory.py --ledger

Each run is a process of its own: pictures that are drawn as they are asked for, no two with
the same bytes, captioned by a tiny random model in few tokens. With ``--ledger`` they go
through `vlm.caption_images` into a file, which keeps a few hundred bytes a row; without, only
through the pipeline beneath it, which must keep none. Visual tokens are cached up to 256 MiB,
which the tiny model's would take 500,000 pictures to fill and a real model's some 50: here
the cache has 1 MiB, so that it is full from the start.
"""

import argparse
import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from vlm.caption_items import Item

MIB = 2**20
Figures = tuple[float, float, float]


def draw(number: int) -> Iterator[Item]:
    """Items with PNG files in memory, 24 x 24, each of another colour."""
    for index in range(number):
        colour = (index & 255, index >> 8 & 255, index >> 16 & 255)
        buffer = io.BytesIO()
        Image.new("RGB", (24, 24), colour).save(buffer, "png", compress_level=1)
        yield Item(f"drawn#{index}", data=buffer.getvalue())


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def run(number: int, ledger: bool, batch_size: int, tokens: int) -> Figures:
    """Peak before the run and after it, in MiB, and seconds; called in a fresh process."""
    import torch

    import vlm
    from vlm import testing
    from vlm.caption_pipeline import results
    from vlm.caption_prompts import CaptionPrompts

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        assistant = vlm.load(testing.tiny_llava_folder(Path(name) / "model"))
        assistant.engine.cache.max_bytes = MIB
        before, began = peak(), time.perf_counter()
        sampling = {"max_new_tokens": tokens}
        if ledger:
            done = vlm.caption_images(
                draw(number),
                Path(name) / "out.jsonl",
                model=assistant,
                batch_size=batch_size,
                max_new_tokens=tokens,
            ).captioned
        else:
            made = results(assistant, draw(number), CaptionPrompts("?"), batch_size, sampling)
            done = sum(result.error is None for result in made)
        assert done == number
        return before, peak(), time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--ledger", action="store_true")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2)
    options = parser.parse_args()
    way = "caption_images" if options.ledger else "the pipeline"
    table = Table(title=f"{way}, {options.batch_size} pictures together")
    for column in ("pictures", "peak MiB", "above the opened model", "bytes a picture", "seconds"):
        table.add_column(column, justify="right")
    first: tuple[int, float] | None = None
    for number in options.pictures:
        arguments = (number, options.ledger, options.batch_size, options.tokens)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            before, most, seconds = pool.submit(run, *arguments).result()
        first = first or (number, most)
        more = number - first[0]
        growth = f"{(most - first[1]) * MIB / more:.0f}" if more else ""
        table.add_row(
            f"{number:,}", f"{most:.0f}", f"{most - before:.0f}", growth, f"{seconds:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
