"""Batches with bad files, a wrong clock or no network: a row for each picture, and an end."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm import testing
from vlm.assistant import Assistant
from vlm.caption_sources import Items
from vlm.errors import ConfigError
from vlm.ledger import Summary


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def run(model: Assistant, source: Any, out: Path, **options: Any) -> Summary:
    options = {"max_new_tokens": 4, "batch_size": 8, **options}
    return vlm.caption_images(source, out, model=model, **options)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_one_bad_file_in_sixty_four(model: Assistant, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for seed in range(64):
        testing.draw_image(seed=seed).save(folder / f"{seed:02}.png")
    (folder / "17.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    assert run(model, folder, out) == Summary(63, 1, 0)
    assert [row["code"] for row in rows(out)] == [None] * 17 + ["undecodable"] + [None] * 46
    assert run(model, folder, out) == Summary(0, 0, 64)


def test_all_bad_and_none_at_all(model: Assistant, tmp_path: Path, out: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(model, empty, out) == Summary(0, 0, 0)
    assert out.read_bytes() == b""
    for name in "abcdefghijk":
        (empty / f"{name}.png").write_bytes(name.encode() * 9)
    assert run(model, empty, out) == Summary(0, 11, 0)
    assert {row["code"] for row in rows(out)} == {"undecodable"}


def test_a_loop_of_links_has_an_end(model: Assistant, pictures: Path, out: Path) -> None:
    """Two links that lead back: following them, there are 2 ** 40 paths."""
    inner = pictures / "inner"
    inner.mkdir()
    testing.draw_image(seed=9).save(inner / "9.png")
    for name in ("loop", "again"):
        (inner / name).symlink_to(pictures)
    expected = [str(pictures / f"{n}.png") for n in range(7)] + [str(inner / "9.png")]
    for pattern in ("**", "**/*.png", "**/**/*.png", "../pic*/**/?.png"):
        items = Items(str(pictures / pattern))
        assert sorted(item.name for item in items) == sorted(expected)
        assert items.count() == 8
    assert [item.name for item in Items(str(pictures / "**" / "inner"))] == expected[-1:]
    assert run(model, str(pictures / "**"), out) == Summary(8, 0, 0)


def test_patterns_leave_hidden_folders_alone(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / ".trash").mkdir()
    os.replace(pictures / "0.png", pictures / ".trash" / "0.png")
    monkeypatch.chdir(pictures)
    assert len(list(Items("**/*.png"))) == 6
    assert len(list(Items(".trash/**"))) == 1


def test_a_file_that_was_missing_is_captioned_once_it_is_there(
    model: Assistant, pictures: Path, out: Path
) -> None:
    names = [pictures / "0.png", pictures / "late.png"]
    assert run(model, names, out) == Summary(1, 1, 0)
    assert [row["code"] for row in rows(out)] == [None, "missing"]
    testing.draw_image(seed=8).save(names[1])
    assert run(model, names, out) == Summary(1, 0, 1)
    assert [row["code"] for row in rows(out)] == [None, "missing", None]


@pytest.mark.parametrize("time", [0, 2**33, -(2**31)])
def test_a_clock_that_is_wrong_loses_and_doubles_nothing(
    model: Assistant, pictures: Path, out: Path, time: int
) -> None:
    """Times before 1970 and after 2200, given to files before the run and between two."""
    os.utime(pictures / "0.png", (time, time))
    assert run(model, pictures, out) == Summary(7, 0, 0)
    for name in ("0.png", "1.png", "2.png"):
        os.utime(pictures / name, (time + 1, time + 1))
    before = (pictures / "2.png").read_bytes()
    other = bytearray(before)
    other[-9] ^= 1  # of the same size, damaged in its last chunk
    (pictures / "2.png").write_bytes(other)
    os.utime(pictures / "2.png", (time + 2, time + 2))
    found = run(model, pictures, out)
    assert (found.skipped, found.captioned + found.failed) == (6, 1)
    assert rows(out)[-1]["path"] == str(pictures / "2.png")


def test_answers_without_end_and_without_a_word_say_so(
    model: Assistant, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rewarded for what is there already, any model goes round in circles.
    assert run(model, pictures, out, max_new_tokens=300, repetition_penalty=0.1) == Summary(7, 0, 0)
    assert {row["finish_reason"] for row in rows(out)} == {"repetition"}
    out.unlink()
    compute, (end, *_) = model.engine.model.logits, model.processor.eos_token_ids

    def ended(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        logits[..., end] = 1e4
        return logits

    monkeypatch.setattr(model.engine.model, "logits", ended)
    assert run(model, pictures, out) == Summary(7, 0, 0)
    for row in rows(out):
        assert (row["caption"], row["finish_reason"], row["error"]) == ("", "stop", None)


def test_no_network_no_home_and_no_temporary_folder(
    folder: Path, pictures: Path, tmp_path: Path, model: Assistant
) -> None:
    """A process of its own, whose sockets raise; on the folder of a model all is there."""
    script = """
        import socket
        import sys

        def refused(*given):
            raise AssertionError(f"asked the network: {given}")

        socket.socket.connect = socket.getaddrinfo = refused
        import vlm

        assistant = vlm.load(sys.argv[1])
        print(vlm.caption_images(sys.argv[2], sys.argv[3], model=assistant, max_new_tokens=4))
        print(assistant.caption(sys.argv[4], max_new_tokens=4).encode().hex())
    """
    gone = str(tmp_path / "gone")
    places = dict.fromkeys(("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME"), gone)
    words = (folder, pictures, tmp_path / "out.jsonl", pictures / "0.png")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        env={**os.environ, **places, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    told, caption = done.stdout.splitlines()
    assert told.startswith("Summary(captioned=7, failed=0")
    assert bytes.fromhex(caption).decode() == model.caption(pictures / "0.png", max_new_tokens=4)
    assert rows(tmp_path / "out.jsonl")[0]["caption"] == bytes.fromhex(caption).decode()


def test_the_ledger_of_another_model_is_refused_without_a_change(
    model: Assistant, pictures: Path, out: Path
) -> None:
    run(model, pictures, out)
    before = out.read_bytes()
    for options in ({"prompt": "and now?"}, {"max_new_tokens": 5}, {"temperature": 0.5, "seed": 1}):
        with pytest.raises(ConfigError, match="another ledger"):
            run(model, pictures, out, **options)
    assert out.read_bytes() == before
