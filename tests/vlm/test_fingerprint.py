"""The identity of a folder: changes with anything that decides an answer, and only then."""

import os
import shutil
from pathlib import Path

import pytest

from vlm import testing
from vlm.errors import CheckpointError
from vlm.fingerprint import fingerprint

SETTINGS = [
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
]
BIG = 3_000_001  # more than the blocks that are read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("model") / "tiny")


def changed(path: Path, at: int) -> None:
    """Flip one byte."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))


def test_it_is_short_and_repeatable(folder: Path, tmp_path: Path) -> None:
    found = fingerprint(folder)
    assert len(found) == 16 and int(found, 16) >= 0
    assert fingerprint(folder) == found
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "config.json", (0, 0))
    (copy / "README.md").write_text("other words")
    (copy / "about.json").write_text("{}")
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    assert fingerprint(copy) == found


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_counts(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / name
    if not path.exists():
        path.write_text("{}")
        assert fingerprint(copy) != fingerprint(folder)
    before = fingerprint(copy)
    changed(path, -1)
    assert fingerprint(copy) != before
    path.unlink()
    assert fingerprint(copy) != before


def test_every_byte_of_a_small_weights_file_counts(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    seen = {fingerprint(copy)}
    for at in (0, 1000, 5000, -5000, -1):
        changed(copy / "model.safetensors", at)
        seen.add(fingerprint(copy))
    assert len(seen) == 6


def test_big_weights_count_by_size_and_evenly_spread_blocks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(BIG))
    seen = {fingerprint(tmp_path)}
    for at in (0, -1):  # the header, and the very end
        changed(path, at)
        seen.add(fingerprint(tmp_path))
    whole = bytearray(path.read_bytes())
    for start in range(0, BIG - 12_000, BIG // 50):
        whole[start : start + 12_000] = b"\x01" * 12_000  # as long as the widest gap
        path.write_bytes(whole)
        seen.add(fingerprint(tmp_path))
    path.write_bytes(bytes(BIG + 1))
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 3 + len(range(0, BIG - 12_000, BIG // 50)) + 1


def test_all_shards_count(tmp_path: Path) -> None:
    first, second = tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"
    first.write_bytes(b"one")
    alone = fingerprint(tmp_path)
    second.write_bytes(b"two")
    both = fingerprint(tmp_path)
    second.write_bytes(b"2")
    assert len({alone, both, fingerprint(tmp_path)}) == 3


def test_weights_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        fingerprint(tmp_path)
