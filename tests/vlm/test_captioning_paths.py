"""Which files a folder gives, in which order, and how far ahead they are read."""

import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm import testing
from vlm.assistant import Assistant
from vlm.captioning import caption_many, expand_paths


def test_folders_are_walked_in_order_and_each_file_comes_once(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = pictures / "a" / "b"
    deep.mkdir(parents=True)
    for path in (deep / "z.JPEG", pictures / "a" / "y.webp", pictures / "notes.txt"):
        path.write_bytes(b"")
    (deep / "loop").symlink_to(pictures)
    names = [f"{seed}.png" for seed in range(7)] + ["a/y.webp", "a/b/z.JPEG"]
    monkeypatch.chdir(pictures)
    again = [
        pictures,
        Path("3.png"),
        pictures / "3.png",
        pictures / "a" / ".." / "4.png",
        pictures / "a",
    ]
    assert list(expand_paths(again)) == [str(pictures / name) for name in names]
    first = list(expand_paths([Path("3.png"), pictures]))
    assert first[0] == str(pictures / "3.png") and sorted(first) == sorted(expand_paths([pictures]))


def test_any_name_is_fine(model: Assistant, tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "line\nbreak.png", "ünï 🐶.png", os.fsdecode(b"\xff.png")]
    names.append("n" * 251 + ".png")
    for name in names:
        testing.draw_image().save(tmp_path / name)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    found = list(model.caption_many([tmp_path], max_new_tokens=2))
    assert {os.path.basename(r.path) for r in found if not r.error} == set(names)
    assert [r.code for r in found if r.error] == ["unreadable"]


def test_addresses_are_refused_and_not_taken_for_files(model: Assistant) -> None:
    [found] = model.caption_many(["https://host/a.png"])
    assert (found.path, found.code) == ("https://host/a.png", "remote_url")


# Reading ahead


def test_paths_are_read_no_further_than_needed(model: Assistant, pictures: Path) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        for taken in itertools.count(1):
            path = pictures / f"copy {taken}.png"
            os.link(pictures / "0.png", path)
            yield path

    results = caption_many(model, endless(), batch_size=2, max_new_tokens=2)
    assert taken == 0
    assert next(results).caption is not None
    time.sleep(0.1)
    assert taken <= 6  # those at the model, the next ones, and a batch ahead
    results.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("vlm-read")]


class Meddler:
    """An assistant that does something to the file between reading and answering."""

    def __init__(self, model: Assistant, path: Path, deed: Any) -> None:
        self._model, self._path, self._deed = model, path, deed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def prepare_ahead(self, image: Any, question: str, **options: Any) -> Any:
        request = self._model.prepare_ahead(image, question, **options)
        self._deed(self._path)
        return request


@pytest.mark.parametrize("deed", [lambda p: p.write_bytes(p.read_bytes() + b"."), Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_told(
    model: Assistant, tmp_path: Path, deed: Any
) -> None:
    path = tmp_path / "line\nbreak.png"
    testing.draw_image().save(path)
    meddler: Any = Meddler(model, path, deed)
    [found] = caption_many(meddler, [path])
    assert (found.code, found.caption, found.sha256) == ("changed", None, None)
    assert "run again" in str(found.error) and "\n" not in str(found.error)


def test_a_file_deleted_before_its_turn_is_missing(model: Assistant, pictures: Path) -> None:
    results = caption_many(model, [pictures], batch_size=1, max_new_tokens=2)
    assert next(results).code is None
    (pictures / "6.png").unlink()
    assert [result.code for result in results] == [None] * 5 + ["missing"]


def test_bad_files_alone_come_as_they_are_read(model: Assistant, tmp_path: Path) -> None:
    """Nothing runs for them; their results must come all the same, and few be read ahead."""
    taken = 0

    def absent() -> Iterator[Path]:
        nonlocal taken
        for taken in range(1, 51):
            yield tmp_path / f"{taken}.png"

    results = caption_many(model, absent(), batch_size=4)
    assert next(results).code == "missing"
    time.sleep(0.1)
    assert taken <= 8  # a batch taken over and one ahead
    assert [result.code for result in results] == ["missing"] * 49
