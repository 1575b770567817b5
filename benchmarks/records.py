"""Reading many records: peak memory over that of the imports, and records a second.

    OMP_NUM_THREADS=1 python benchmarks/records.py
    OMP_NUM_THREADS=1 python benchmarks/records.py --num 100000 --random 10000

One million dialogues of two turns are written once as JSONL (pictures named by paths) and as
Parquet (a PNG of some hundred bytes inside each row). Each way to read them is a process of
its own: streamed by `data_recipes.formats.read`, and by index, in order and at random, by
`vlm.record_files.RecordFiles`. No picture is decoded. Memory is the most that the process
ever had, less what it had after its imports.
"""

import argparse
import io
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from data_recipes.formats import read, write_jsonl, write_parquet
from data_recipes.mix import Mixture
from vlm.messages import Record, assistant, user
from vlm.record_files import RecordFiles

MIB = 2**20
Figures = tuple[int, float, float]


def draw(number: int, folder: Path, inside: bool) -> Iterator[Record]:
    """Synthetic records; `inside` gives pictures as bytes."""
    for i in range(number):
        image = _png(i) if inside else str(folder / "images" / f"{i % 1000:03}" / f"{i:07}.png")
        turns = [user(f"What is in picture {i}, and what is beside it?", image)]
        turns += [assistant(f"A scene of {i % 97} things, one of which is number {i}.")]
        turns += [user("Is it day or night?"), assistant("It is day, as the shadows tell.")]
        yield Record(f"r{i}", (image,), tuple(turns), source="synthetic", meta={"score": i % 7})


def _png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number & 255, number >> 8 & 255, number >> 16)).save(file, "png")
    return file.getvalue()


def stream(path: Path, number: int) -> Iterable[Record]:
    """All records, one after the other."""
    return read(path)


def in_order(path: Path, number: int) -> Iterable[Record]:
    """All records by their index."""
    files = RecordFiles([path])
    return (files[i] for i in range(len(files)))


def at_random(path: Path, number: int) -> Iterable[Record]:
    """Some records by random indices."""
    files = RecordFiles([path])
    dice = random.Random(0)
    return (files[dice.randrange(len(files))] for _ in range(number))


def mixed(path: Path, number: int) -> Iterable[Record]:
    """The first records of a mixture of half of them."""
    files = RecordFiles([path])
    mixture = Mixture([files], [len(files) // 2])
    return (mixture[i] for i in range(min(number, len(mixture))))


WAYS: dict[str, Callable[[Path, int], Iterable[Record]]] = {
    "formats.read": stream,
    "RecordFiles, in order": in_order,
    "RecordFiles, at random": at_random,
    "Mixture of half of them": mixed,
}


def peak() -> float:
    """The most memory that this process has had, in MiB, as Linux tells it.

    Not `getrusage`: a new process starts there with its parent's figure.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / MIB


def run(way: str, path: Path, number: int) -> Figures:
    """Records read, MiB over the imports and seconds; called in a fresh process."""
    import pyarrow.parquet  # noqa: F401, the readers import it when they meet such a file

    before, began = peak(), time.perf_counter()
    count = sum(1 for record in WAYS[way](path, number) if record.messages)
    return count, peak() - before, time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num", type=int, default=1_000_000, help="records")
    parser.add_argument("--random", type=int, default=100_000, help="records read at random")
    options = parser.parse_args()
    table = Table(title=f"{options.num:,} records")
    for column in ("file", "MiB", "read by", "records", "MiB over imports", "records/s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(draw(options.num, folder, False), folder)
        write_parquet(draw(options.num, folder, True), folder)
        for path in (folder / "records.jsonl", folder / "records.parquet"):
            size = f"{path.stat().st_size / MIB:,.0f}"
            for way in WAYS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    count, more, seconds = pool.submit(run, way, path, options.random).result()
                pace = f"{count / seconds:,.0f}"
                table.add_row(path.name, size, way, f"{count:,}", f"{more:,.0f}", pace)
    Console().print(table)


if __name__ == "__main__":
    main()
