"""Sources of pictures: what each gives, by which names, and how bad ones are told."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from vlm import testing
from vlm.caption_items import Item
from vlm.caption_sources import Items
from vlm.errors import ConfigError, ImageError, RecordError
from vlm.images import load_image


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    testing.draw_image(seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def seeds(items: Iterator[Item] | Items) -> list[int]:
    """Which of the drawn pictures these are, by their pixels."""
    known = {load_image(testing.draw_image(seed=seed)).sha256: seed for seed in range(9)}
    return [known[load_image(item.load()).sha256] for item in items]


def named(source: Any, top: Path, **options: Any) -> list[str]:
    return [item.name.removeprefix(f"{top}/") for item in Items(source, **options)]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for seed, name in enumerate(("b/1.png", "b/c/2.png", "a.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
    (tmp_path / "b" / "notes.md").write_text("no picture")
    return tmp_path


def add(file: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.addfile(info, io.BytesIO(data))


# Files


def test_folders_patterns_and_lists(top: Path) -> None:
    whole = ["a.png", "b/1.png", "b/c/2.png"]
    assert named(top, top) == whole and seeds(Items(top)) == [2, 0, 1]
    assert named(str(top / "**" / "*.png"), top) == whole
    assert named(top / "b" / "?.png", top) == ["b/1.png"]
    assert named([top / "b", top / "a.png"], top) == ["b/1.png", "b/c/2.png", "a.png"]
    assert named(top / "a[1].png", top) == ["a[1].png"]  # absent, and gets a row that says so
    once = Items(iter([top / "b", top / "a.png"]))
    assert once.count() is None and seeds(once) == [0, 1, 2]
    assert Items(top).count() == Items(str(top / "**" / "*.png")).count() == 3
    first = next(iter(Items(top / "b")))
    assert dict(first.meta) == {"name": "1", "directory": "b"}


def test_a_list_of_paths(top: Path) -> None:
    (top / "list.txt").write_text(f"b/1.png\r\n\n{top}/a.png\nabsent.png\nhttps://host/x.png\n")
    names = ["b/1.png", "a.png", "absent.png", "https://host/x.png"]
    assert named(top / "list.txt", top) == names and Items(top / "list.txt").count() == 4
    codes = []
    for item in Items(top / "list.txt"):
        try:
            item.load()
        except ImageError as error:
            codes.append(error.code)
    assert codes == ["missing", "remote_url"]


def test_in_memory_sources(top: Path) -> None:
    source = [png(4), testing.draw_image(seed=5), {"image": png(6), "tags": ["x", "y"]}]
    assert seeds(Items(source)) == [4, 5, 6]
    assert named(source, top) == ["list#0", "list#1", "list#2"]
    assert list(Items(source))[2].meta["tags"] == "x, y"


# Tables


@pytest.mark.parametrize("column", ["image", "file_name", "picture"])
def test_jsonl_and_csv_with_paths(top: Path, column: str) -> None:
    rows = [{column: "b/1.png", "tags": "dog, cat", "n": 3}, {column: str(top / "a.png")}]
    lines, table = top / "rows.jsonl", top / "rows.csv"
    lines.write_text("\n".join(map(json.dumps, rows)))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [column, "tags", "n"])
        writer.writeheader()
        writer.writerows(rows)
    for path in (lines, table):
        named_column = column if column == "picture" else None
        items = Items(path, named_column)
        assert [item.name for item in items] == [str(top / "b/1.png"), str(top / "a.png")]
        assert items.count() == 2 and seeds(items) == [0, 2]
        meta = next(iter(items)).meta
        assert (meta["tags"], meta["n"], meta["name"]) == ("dog, cat", "3", "1")
    if column == "picture":
        with pytest.raises(RecordError, match=r"rows\.jsonl:1 has no column.*picture, tags, n"):
            list(Items(lines))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"image": "a.png"}\n{"image": \n', r"rows\.jsonl:2 is no JSON"),
        ("[1]\n", r"rows\.jsonl:1 holds a list"),
        ('\n{"image": 3, "b": 1}\n', r"rows\.jsonl:2: column 'image' holds int '3'.*image, b"),
        ('{"picture": "a.png", "b": 1}\n', r"rows\.jsonl:1 has no column.*picture, b"),
    ],
)
def test_lines_of_an_unknown_shape_are_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(RecordError, match=told):
        list(Items(path))


def dataset(column: str = "image") -> datasets.Dataset:
    rows = {
        "tags": ["dog", "cat", "owl"],
        column: [{"bytes": png(s), "path": None} for s in (3, 4, 5)],
    }
    return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    dataset("photo").to_parquet(path)
    items = Items(path)
    assert seeds(items) == [3, 4, 5] and items.count() == 3
    assert named(path, tmp_path) == [f"rows.parquet#{row}" for row in range(3)]
    assert next(iter(items)).meta == {"tags": "dog", "name": "0", "directory": "rows.parquet"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"rows\.parquet is no readable Parquet"):
        list(Items(path))


@pytest.mark.parametrize("make", [lambda d: d, lambda d: d.to_iterable_dataset()])
def test_datasets_of_both_kinds(make: Callable[[Any], Any]) -> None:
    source = make(dataset("photo"))
    items = Items(source)
    assert seeds(items) == seeds(items) == [3, 4, 5]
    assert [item.name for item in items] == [f"dataset#{row}" for row in range(3)]
    assert next(iter(items)).meta["tags"] == "dog"
    assert isinstance(next(iter(items)).load(), bytes)  # the gate decodes, nobody else


def test_a_dataset_without_pictures_is_told() -> None:
    source = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ConfigError, match="only text"):
        list(Items(source))
    with pytest.raises(ConfigError, match="name a split"):
        Items(datasets.DatasetDict({"train": source}))


# Shards


def test_a_shard_is_read_as_a_stream(tmp_path: Path) -> None:
    shard = tmp_path / "00.tar"
    with tarfile.open(shard, "w") as file:
        add(file, "x/a.json", b'{"tags": ["dog", "cat"], "nested": {}}')
        add(file, "x/a.png", png(6))
        add(file, "x/a.txt", b" an owl\n")
        add(file, "../evil.jpg", png(7))
        add(file, "only.txt", b"no picture")
        add(file, "both.jpg", png(8))
        add(file, "both.png", png(0))
    items = list(Items(shard))
    keys = [item.name.removeprefix(f"{shard}#") for item in items]
    assert keys == ["x/a", "../evil", "both", "both.png"]
    assert seeds(iter(items)) == [6, 7, 8, 0]
    words = {"tags": "dog, cat", "txt": "an owl", "name": "a", "directory": "00.tar"}
    assert items[0].meta == words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.tar"]  # nothing extracted


def test_damaged_shards_are_told(tmp_path: Path) -> None:
    shard = tmp_path / "00.tar"
    with tarfile.open(shard, "w") as file:
        add(file, "a.png", png(6))
        add(file, "b.png", png(7) * 9)
    shard.write_bytes(shard.read_bytes()[:3000])
    first, last = Items(shard)
    assert (first.name, last.name) == (f"{shard}#a", f"{shard}#")
    with pytest.raises(ImageError, match="stops or is damaged after 'b'") as caught:
        last.load()
    assert caught.value.code == "truncated"
    shard.write_bytes(b"no tar" * 200)
    with pytest.raises(RecordError, match=r"00\.tar is no readable tar file"):
        list(Items(shard))
    with tarfile.open(shard, "w") as file:
        add(file, "a.txt", b"words")
    with pytest.raises(RecordError, match=r"no pictures.*only \.txt"):
        list(Items(shard))


@pytest.mark.parametrize("source", [3, b"bytes", None])
def test_what_is_no_source_is_told(source: Any) -> None:
    with pytest.raises(ConfigError, match="no source of pictures"):
        Items(source)
