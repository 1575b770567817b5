"""A captioning run killed again and again beside one that is left alone.

    python benchmarks/caption_ledger.py
    python benchmarks/caption_ledger.py --pictures 200 --kills 3

Drawn pictures, one in a hundred broken in one of five ways, captioned by the built-in model
through the command line. The first run is never disturbed. The second is killed (SIGKILL) at
random moments and started again; a last start lets it end. Both must have each picture
exactly once, every broken one with its code, and the same captions.
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlm import testing

COMMAND = [sys.executable, "-c", "from serve.cli import main; main()"]
Row = tuple[str, str | None, str | None]


def bomb(png: bytes) -> bytes:
    """The picture with a header that declares 65535 x 65535 pixels."""
    header = b"IHDR" + struct.pack(">II", 65_535, 65_535) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def draw(folder: Path, number: int) -> dict[str, str]:
    """Write pictures; the broken ones by path, with the code that they must get."""
    broken: dict[str, str] = {}
    for seed in range(number):
        path = folder / f"{seed // 1000:03}" / f"{seed:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        testing.draw_image((64, 64), seed=seed).save(path)
        if seed % 100 == 42:
            data = path.read_bytes()
            kinds = [
                (b"", "empty_image"),
                (data[:-60], "truncated"),
                (b"no picture", "undecodable"),
                (b"%PDF-1.7", "unsupported_format"),
                (bomb(data), "too_many_pixels"),
            ]
            content, code = kinds[seed // 100 % len(kinds)]
            path.write_bytes(content)
            broken[str(path)] = code
    return broken


def start(album: Path, out: Path, tokens: int, batch_size: int) -> subprocess.Popen[bytes]:
    """The command, its words thrown away."""
    words = ["caption", album, "-o", out, "--max-new-tokens", tokens, "--batch-size", batch_size]
    command = [*COMMAND, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def num_rows(out: Path) -> int:
    """Whole lines so far."""
    return out.read_bytes().count(b"\n") if out.exists() else 0


def disturb(album: Path, out: Path, options: argparse.Namespace) -> list[int]:
    """Run, killed at random moments; the rows that each kill left."""
    moments = random.Random(options.seed)
    left: list[int] = []
    for kill in range(options.kills):
        share = (kill + moments.random()) / options.kills
        wanted = max(num_rows(out) + 1, int(share * options.pictures))
        process = start(album, out, options.tokens, options.batch_size)
        while num_rows(out) < wanted and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.05 * moments.random())
        process.kill()
        process.wait()
        left.append(num_rows(out))
    assert start(album, out, options.tokens, options.batch_size).wait() == 0
    return left


def rows(out: Path) -> list[dict[str, Any]]:
    """What a ledger holds."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def said(ledger: list[dict[str, Any]]) -> list[Row]:
    """What does not depend on time."""
    return sorted((row["path"], row["caption"], row["code"]) for row in ledger)


def main() -> None:
    """Run, check and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        broken = draw(top / "album", options.pictures)
        whole, out = top / "whole.jsonl", top / "out.jsonl"
        began = time.perf_counter()
        assert start(top / "album", whole, options.tokens, options.batch_size).wait() == 0
        seconds = time.perf_counter() - began
        left = disturb(top / "album", out, options)
        expected, found = rows(whole), rows(out)
        size = os.path.getsize(out)
    for ledger in (expected, found):
        paths = [row["path"] for row in ledger]
        assert len(paths) == len(set(paths)) == options.pictures, "a picture is lost or doubled"
        codes = {row["path"]: row["code"] for row in ledger if row["code"] is not None}
        assert codes == broken, "a broken picture lacks its code"
    assert said(found) == said(expected), "the disturbed run says something else"
    table = Table(title=f"{options.pictures:,} pictures, {len(broken):,} broken")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("pictures a second, undisturbed", f"{options.pictures / seconds:.0f}")
    table.add_row("rows after each kill", ", ".join(f"{number:,}" for number in left))
    table.add_row("rows in the end, each picture once", f"{len(found):,}")
    table.add_row("broken, each with its code", f"{len(broken):,}")
    table.add_row("captions that differ", "0")
    table.add_row("bytes a row", f"{size / len(found):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
