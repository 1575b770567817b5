"""How fast the doctor goes through records: records a second on one core.

    OMP_NUM_THREADS=1 python benchmarks/doctor.py

Every record has a JPEG of its own (hard links of a few hundred files with an own path each),
two questions and a real processor's token count. Pixels are not decoded.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_recipes.doctor import Options, doctor
from data_recipes.formats import Fault
from data_recipes.formats import read as read_any
from vlm.builtin import path as builtin
from vlm.messages import Record
from vlm.processor import Processor

_FILES = 256


def make(folder: Path, num: int) -> Path:
    """Write `num` records and their pictures."""
    dice = np.random.default_rng(0)
    for i in range(_FILES):
        noise = Image.fromarray(dice.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        noise.resize((640, 480)).save(folder / f"{i}.jpg", quality=85)
    pictures = folder / "pictures"
    pictures.mkdir()
    with (folder / "records.jsonl").open("w") as file:
        for i in range(num):
            os.link(folder / f"{i % _FILES}.jpg", pictures / f"{i}.jpg")
            user = [{"type": "image"}, {"type": "text", "text": f"What is in picture {i}?"}]
            turns = [("user", user), ("assistant", f"A scene with {i} coloured patches of noise.")]
            turns += [("user", "Is it sharp?"), ("assistant", "no")]
            row = {"id": str(i), "images": [f"pictures/{i}.jpg"]}
            row["messages"] = [{"role": role, "content": said} for role, said in turns]
            file.write(json.dumps(row) + "\n")
    return folder / "records.jsonl"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100_000, help="records")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    processor = Processor.from_folder(builtin())
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name), args.num)

        def read(faults: Callable[[Fault], None]) -> Iterator[Record]:
            return read_any(path, faults=faults)

        options = Options(sample=0, workers=args.workers)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, busy = time.perf_counter(), time.process_time()

        def work() -> None:
            print(doctor(read, Path(name) / "out", title="x", processor=processor, options=options))

        if args.profile:
            import cProfile

            cProfile.runctx("work()", {"work": work}, {}, sort="tottime")
        else:
            work()
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{args.num / seconds:,.0f} records/s, {seconds:.1f} s, peak RSS +{peak / 1024:.0f} MiB")
    print(f"{args.num / busy:,.0f} records a second of processor time, {busy:.1f} s")


if __name__ == "__main__":
    main()
