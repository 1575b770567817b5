"""What safetensors files hold, by their headers; and one hash of it all. No import of torch.

A header is JSON behind its own length in eight bytes; the tensors follow, each at the
place that the header names (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vlm.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        path: of the file.
        dtype: by the format's name, such as ``"BF16"``.
        shape: its sizes.
        start: where its bytes begin, counted from the beginning of the file.
        num_bytes: how many they are.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_headers(paths: Iterable[Path]) -> dict[str, TensorEntry]:
    """All tensors of these files by name; reads no weights.

    Raises:
        CheckpointError: a file is truncated or malformed, or two hold the same name.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        try:
            found = _read_header(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({error}); download it again"
            ) from error
        if twice := entries.keys() & found.keys():
            raise CheckpointError(
                f"{path}: {min(twice)} is in {entries[min(twice)].path.name} too; remove the file "
                "that does not belong here"
            )
        entries |= found
    return entries


def content_sha256(entries: Mapping[str, TensorEntry]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, in the order of the names.

    The same weights give the same hash, however they are spread over files. The files are
    read in pieces of 4 MiB, once.

    Raises:
        CheckpointError: a file cannot be read, or became shorter since its header was read.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode() + b"\n")
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                _add(digest, file, entry.num_bytes)
        except OSError as error:
            raise CheckpointError(f"{entry.path}: cannot be read ({error})") from error
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", file: BinaryIO, num_bytes: int) -> None:
    while num_bytes:
        block = file.read(min(num_bytes, _BLOCK_BYTES))
        if not block:
            raise OSError("it ends before its last tensor")
        digest.update(block)
        num_bytes -= len(block)


def _read_header(path: Path) -> dict[str, TensorEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("its header is cut off")
        raw: Any = json.loads(file.read(length))
    if not isinstance(raw, dict):
        raise ValueError("its header is no JSON object")
    entries = {}
    for name, facts in raw.items():
        if name == "__metadata__":
            continue
        begin, end = facts["data_offsets"]
        if not 0 <= begin <= end <= size - 8 - length:
            raise ValueError(f"{name} lies outside the file")
        shape = tuple(int(side) for side in facts["shape"])
        entries[name] = TensorEntry(
            path, str(facts["dtype"]), shape, 8 + length + begin, end - begin
        )
    return entries
