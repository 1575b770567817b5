"""Identity of a model folder's contents, cheap enough to take at every start."""

import hashlib
from pathlib import Path

from vlm.errors import CheckpointError

BLOCK_BYTES = 4096
NUM_BLOCKS = 256
# Everything that decides an answer; not README.md, about.json and the like.
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change when the folder's model changes.

    Settings and tokenizer count whole. Of each weights file its size and 256 blocks of
    4 KiB spread evenly over it, the header included: training moves every layer, so it
    shows, while a 14 GB file costs a megabyte of reading. A change of a few single
    weights in a big file may go unseen. Names and times of files do not count.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name in _SETTINGS:
            path = folder / name
            if path.is_file():
                digest.update(f"{name} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
        for path in sorted(folder.glob("*.safetensors")):
            _add_blocks(digest, path)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    return digest.hexdigest()[:16]


def _add_blocks(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"weights {size}\n".encode())
    with path.open("rb") as file:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
            return
        for i in range(NUM_BLOCKS):
            file.seek(i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
