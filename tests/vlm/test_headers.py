"""Headers and the hash of all weights: of what is in the files, however it is spread."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import CheckpointError
from vlm.headers import content_sha256, read_headers

State = dict[str, torch.Tensor]


def state() -> State:
    return {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }


def hash_of(folder: Path, *files: State, metadata: dict[str, str] | None = None) -> str:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.safetensors" for number in range(len(files))]
    for path, tensors in zip(paths, files, strict=True):
        save_file(tensors, path, metadata=metadata)
    return content_sha256(read_headers(paths))


def test_a_header_tells_names_types_and_shapes(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_headers([tmp_path / "x.safetensors"])
    told = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    assert told == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (3,)),
        "scalar": ("I64", ()),
        "empty": ("F32", (0, 4)),
    }
    raw = (tmp_path / "x.safetensors").read_bytes()
    part = entries["a"]
    assert raw[part.start : part.start + part.num_bytes] == state()["a"].numpy().tobytes()


def test_sharding_order_and_metadata_do_not_count(tmp_path: Path) -> None:
    whole, found = state(), {hash_of(tmp_path, state())}
    for split in (("a",), ("b", "scalar"), ("empty",)):
        left = {name: whole[name] for name in split}
        right = {name: whole[name] for name in whole if name not in split}
        found |= {hash_of(tmp_path, left, right), hash_of(tmp_path, right, left)}
    found.add(hash_of(tmp_path, state(), metadata={"format": "pt", "more": "words"}))
    assert len(found) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["a"][1, 2].add_(1e-5),
        lambda s: s.update(b=s["b"].to(torch.float16)),
        lambda s: s.update(a=s["a"].reshape(3, 2)),
        lambda s: s.update(a=s["a"].view(torch.int32)),
        lambda s: s.update(c=s.pop("a")),
        lambda s: s.pop("empty"),
    ],
    ids=["value", "type", "shape", "type alone", "name", "an empty tensor"],
)
def test_every_part_of_the_weights_counts(
    tmp_path: Path, change: Callable[[State], object]
) -> None:
    changed = state()
    change(changed)
    assert hash_of(tmp_path, changed) != hash_of(tmp_path, state())


def test_hashing_holds_a_piece_of_the_file_and_not_all_of_it(tmp_path: Path) -> None:
    save_file({"big": torch.zeros(12_000_000)}, tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        content_sha256(read_headers([tmp_path / "x.safetensors"]))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000 < 48_000_000
    finally:
        tracemalloc.stop()


def test_the_same_name_twice_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1\.safetensors: b is in 0\.safetensors too"):
        hash_of(tmp_path, state(), {"b": torch.ones(1)})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08",
        b"\xff" * 20,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x02\0\0\0\0\0\0\0{",
        b'\x08\0\0\0\0\0\0\0{"a": 1}',
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not a complete safetensors file") as caught:
        read_headers([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(state(), path)
    entries = read_headers([path])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="lies outside the file"):
        read_headers([path])
    with pytest.raises(CheckpointError, match="ends before its last tensor"):
        content_sha256(entries)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        content_sha256(entries)
