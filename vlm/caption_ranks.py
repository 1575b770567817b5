"""One captioning run by several processes: each writes a part, the last one merges them.

A picture belongs to a rank by a hash of its name, so shards do not move when files are
added. ``captions.jsonl.0-of-2`` is a part; the ``.done`` beside it says for which input it
is complete. Parts meet through files alone, so ranks may also run one after the other.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vlm.errors import ConfigError, RecordError
from vlm.ledger_rows import encode_row, name_key, open_locked, read_line, read_rows

_PART = re.compile(r"\.(\d+)-of-(\d+)$")
_PATIENCE = 5.0  # seconds for a rank that is about to end
MERGE_SECONDS = 60.0  # that a rank waits for its part while the others merge it
_OFFSET_BITS = 48


def ranks_of_environment() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun sets them; (0, 1) without.

    Raises:
        ConfigError: they are no rank and number of ranks.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        return check_ranks(int(rank), int(world))
    except ValueError as error:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world} in the environment are no rank of a number of "
            "ranks; set both, or neither"
        ) from error


def check_ranks(rank: int, world: int) -> tuple[int, int]:
    """Both, or a ConfigError where there is no such rank."""
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} does not exist; ranks count from 0")
    return rank, world


def device_of_rank(device: Any, world: int) -> Any:
    """The device as given; where it is "auto" and ranks share CUDA devices, one for each."""
    if world == 1 or device != "auto":
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def part_path(out: Path, rank: int, world: int) -> Path:
    """Where a rank writes; the ledger itself if it is alone."""
    return out if world == 1 else out.with_name(f"{out.name}.{rank}-of-{world}")


def is_mine(name: str, rank: int, world: int) -> bool:
    """Whether a picture belongs to this rank."""
    return world == 1 or int.from_bytes(name_key(name)[:8], "big") % world == rank


def parts_of(out: Path) -> list[Path]:
    """The parts that lie beside a ledger, in the order of their ranks."""
    found: list[tuple[int, int, Path]] = []
    with contextlib.suppress(OSError):
        for path in out.parent.iterdir():
            match = _PART.search(path.name)
            if match and path.name[: match.start()] == out.name:
                found.append((int(match[2]), int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def check_parts(out: Path, world: int) -> None:
    """Raise ConfigError if parts of another number of ranks wait to be merged."""
    for path in parts_of(out):
        if not path.name.endswith(f"-of-{world}"):
            raise ConfigError(
                f"{path} is a part of a run by another number of ranks; run that again, or "
                f"`vlm caption --merge -o {out}` first"
            )


def done_path(part: Path) -> Path:
    """The mark of a complete part."""
    return part.with_name(f"{part.name}.done")


def merge_if_complete(out: Path, world: int, mark: str) -> bool:
    """Merge when all ranks are done with the input that `mark` stands for.

    Returns:
        True if this process has merged.
    """
    parts = [part_path(out, rank, world) for rank in range(world)]

    def complete() -> bool:
        return all(_read_mark(part) == mark for part in parts)

    if not complete():
        return False
    try:
        return merge(out, parts, complete) is not None
    except ConfigError:
        return False  # a rank has started again; it will merge


def merge(
    out: Path, parts: list[Path] | None = None, still: Callable[[], bool] | None = None
) -> int | None:
    """Join parts and ledger into one ledger, each picture once, in input order.

    Args:
        out: the ledger; its own rows come first.
        parts: by default all that lie beside it.
        still: asked once all parts are held; False leaves everything as it is.

    Returns:
        The number of rows; None if `still` said no.

    Raises:
        ConfigError: there is no part, or a process still writes one.
        RecordError: a part is no ledger, or the ledger cannot be written.
    """
    found = parts_of(out) if parts is None else parts
    if not found:
        raise ConfigError(f"no part of {out} lies beside it; nothing to merge")
    with contextlib.ExitStack() as held:
        existing = [out] if out.exists() else []
        files: list[BinaryIO] = []
        for path in [*existing, *found]:
            files.append(held.enter_context(open_locked(path, _PATIENCE)))
        if still is not None and not still():
            for path in found:  # opening made those that were merged meanwhile
                if path.stat().st_size == 0 and not done_path(path).exists():
                    path.unlink()
            return None
        places = _places([*existing, *found], bool(existing))
        temporary = out.with_name(f"{out.name}.tmp")
        try:
            with open(temporary, "wb") as file:
                for place in places:
                    file.write(_row_at(files, place))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, out)
        except OSError as error:
            raise RecordError(f"{out} cannot be written ({error.strerror}); make room") from error
        for path in found:
            path.unlink()
            done_path(path).unlink(missing_ok=True)
    return len(places)


def _places(paths: list[Path], has_ledger: bool) -> list[int]:
    """Where the row of each picture stands, file and offset, in input order."""
    last: dict[bytes, tuple[int, int]] = {}
    for number, path in enumerate(paths):
        for order, (offset, row) in enumerate(read_rows(path)):
            key = name_key(row["path"])
            is_part = not (has_ledger and number == 0)
            at = (1 << 62) + int(row.get("index", order)) if is_part else order
            if key in last:  # a newer row keeps the place of the older one
                at = last[key][0]
            last[key] = (at, number << _OFFSET_BITS | offset)
    return [place for _, place in sorted(last.values())]


def _row_at(files: list[BinaryIO], place: int) -> bytes:
    line = read_line(files[place >> _OFFSET_BITS].fileno(), place & ((1 << _OFFSET_BITS) - 1))
    row: dict[str, Any] = json.loads(line)
    row.pop("index", None)
    return encode_row(row)


def _read_mark(part: Path) -> str | None:
    try:
        return done_path(part).read_text(encoding="utf-8")
    except OSError:
        return None


@contextlib.contextmanager
def marking(part: Path, world: int) -> Iterator[Callable[[str], None]]:
    """For a rank that holds its part: takes the old mark away; the value sets the new one."""
    if world > 1:
        done_path(part).unlink(missing_ok=True)

    def done(mark: str) -> None:
        if world > 1:
            temporary = part.with_name(f"{part.name}.done.tmp")
            temporary.write_text(mark, encoding="utf-8")
            os.replace(temporary, done_path(part))

    yield done
