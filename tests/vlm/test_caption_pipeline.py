"""From items to results: what waits for what, what breaks alone, what is left behind."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm
from vlm import testing
from vlm.assistant import Assistant
from vlm.caption_items import Item, file_item
from vlm.caption_pipeline import results
from vlm.caption_prompts import CaptionPrompts
from vlm.captioning import CaptionResult
from vlm.errors import GenerationError

LONG = 60
PATIENCE = 20.0  # seconds until a test that hangs fails


def run(
    model: Assistant,
    items: Any,
    size: int,
    tokens: int = 24,  # from here on each picture has a caption of its own
    **options: Any,
) -> Any:
    prompts = CaptionPrompts(options.pop("prompt", "describe."))
    sampling = {"max_new_tokens": tokens, "stop_loops": False}
    return results(model, items, prompts, size, sampling, **options)


def pictured(*seeds: int) -> list[Item]:
    return [Item(f"#{n}", data=testing.draw_image(seed=s)) for n, s in enumerate(seeds)]


def threads() -> list[str]:
    names = ("vlm-read", "vlm-arrivals")
    return [t.name for t in threading.enumerate() if t.name.startswith(names)]


@pytest.fixture
def broken(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Seeds of pictures whose visual tokens are NaN; fill it to break the model on them."""
    seeds: set[int] = set()
    encode = model.engine.model.encode_images

    def pixels(seed: int) -> torch.Tensor:
        return model.processor.pixel_values([vlm.load_image(testing.draw_image(seed=seed))])[0]

    def encode_images(batch: torch.Tensor) -> torch.Tensor:
        found = encode(batch)
        for row, given in enumerate(batch):
            if any(torch.equal(given, pixels(seed)) for seed in seeds):
                found[row] = torch.nan
        return found

    monkeypatch.setattr(model.engine.model, "encode_images", encode_images)
    yield seeds
    model.engine.cache.clear()
    model.engine.prefixes.clear()


# What waits for what


def test_a_picture_runs_before_the_next_one_is_there(model: Assistant, tmp_path: Path) -> None:
    told = threading.Event()
    in_time: list[bool] = []

    def slow() -> Iterator[Item]:
        for item in (*pictured(0), file_item(str(tmp_path / "absent.png")), *pictured(1)):
            yield item
            in_time.append(told.wait(PATIENCE))
            told.clear()

    for result in run(model, slow(), 16):
        assert result.code in (None, "missing")
        told.set()
    assert in_time == [True] * 3


def test_a_picture_joins_one_that_runs_without_waiting_for_others(
    model: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, together = threading.Event(), threading.Event()
    advance = model.engine._advance

    def watched(old: list[Any], new: list[Any]) -> None:
        runs.set()
        if len(old) + len(new) > 1:
            together.set()
        advance(old, new)

    monkeypatch.setattr(model.engine, "_advance", watched)
    joined: list[bool] = []

    def source() -> Iterator[Item]:
        yield from pictured(0)
        assert runs.wait(PATIENCE)
        yield from pictured(1)
        joined.append(together.wait(PATIENCE))

    assert len(list(run(model, source(), 32, tokens=300))) == 2
    assert joined == [True]


def test_bad_files_wait_for_no_picture_behind_them(
    model: Assistant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = model.engine.step

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return step()

    monkeypatch.setattr(model.engine, "step", counted)
    bad = [file_item(str(tmp_path / f"{n}.png")) for n in range(40)]
    found = run(model, [*bad[:20], *pictured(0), *bad[20:]], 4, tokens=LONG)
    assert [next(found).code for _ in range(20)] == ["missing"] * 20
    assert steps <= LONG  # the picture may run, but its end is not waited for
    assert next(found).code is None
    assert [result.code for result in found] == ["missing"] * 20


def test_a_row_that_ends_makes_room_at_once(
    model: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long answer among short ones: fixed batches would take a long time each."""
    steps = 0
    step = model.engine.step

    def counted() -> bool:
        nonlocal steps
        steps += 1
        return step()

    items = pictured(*range(24))
    lengths = [LONG if n % 4 == 0 else 2 for n in range(24)]
    by_name = {item.name: length for item, length in zip(items, lengths, strict=True)}
    requests = [
        model.prepare_ahead(item.data, "x", max_new_tokens=by_name[item.name], stop_loops=False)
        for item in items
    ]
    expected = [model.run([request])[0] for request in requests]
    monkeypatch.setattr(model.engine, "step", counted)
    found = list(model.run_all(requests, 4))
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    in_batches = 6 * LONG
    assert sum(lengths) / 4 <= steps < in_batches / 1.8


# What breaks alone


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_picture_that_breaks_the_model_is_an_error_of_its_own(
    model: Assistant, broken: set[int], size: int
) -> None:
    expected = [result.caption for result in run(model, pictured(*range(9)), size)]
    model.engine.cache.clear()
    broken |= {0, 4, 8}
    found = list(run(model, pictured(*range(9)), size))
    assert [result.code for result in found] == [
        "generation" if seed in broken else None for seed in range(9)
    ]
    for seed, result in enumerate(found):
        assert result.path == f"#{seed}"
        assert (result.caption, result.error is None) == (
            (None, False) if seed in broken else (expected[seed], True)
        )


def test_a_model_that_never_answers_ends_the_run(model: Assistant, broken: set[int]) -> None:
    broken |= set(range(12))
    came: list[CaptionResult] = []
    with pytest.raises(GenerationError):
        came += run(model, pictured(*range(12)), 4)
    with pytest.raises(GenerationError):
        came += run(model, pictured(0, 1), 4)
    assert came == [] and threads() == []  # no row says that these pictures are bad
    [alone] = run(model, pictured(0), 4)
    assert alone.code == "generation"


def test_pictures_of_the_same_bytes_share_what_comes_of_them(
    model: Assistant, broken: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model waits until all have been read, so that none is known when it is read."""
    broken.add(1)
    read: list[Any] = []
    all_read = threading.Event()
    prepare, step = model.prepare_ahead, model.engine.step

    def prepared(*args: Any, **options: Any) -> Any:
        made = prepare(*args, **options)
        read.append(made)
        if len(read) == 6:
            all_read.set()
        return made

    def stepped() -> bool:
        assert all_read.wait(PATIENCE)
        time.sleep(0.02)  # the last one is handed over
        return step()

    monkeypatch.setattr(model, "prepare_ahead", prepared)
    monkeypatch.setattr(model.engine, "step", stepped)
    found = list(run(model, pictured(0, 1, 0, 2, 1, 0), 6, find=lambda same: None))
    assert [result.copy_of for result in found] == [None, None, "#0", None, "#1", "#0"]
    assert [r.code for r in found] == [None, "generation", None, None, "generation", None]
    assert found[0].caption == found[2].caption == found[5].caption != found[3].caption


# Ends


def test_an_error_of_the_source_comes_after_what_was_before_it(
    model: Assistant, tmp_path: Path, broken: set[int]
) -> None:
    broken.add(1)

    def source() -> Iterator[Item]:
        yield from pictured(0)
        yield file_item(str(tmp_path / "absent.png"))
        yield from pictured(1)
        raise OSError("the disk is gone")

    came: list[str | None] = []
    with pytest.raises(OSError, match="the disk is gone"):
        came.extend(result.code for result in run(model, source(), 8))
    assert came == [None, "missing", "generation"] and threads() == []


def test_a_run_that_is_closed_leaves_nothing_behind(model: Assistant) -> None:
    def endless() -> Iterator[Item]:
        for number in itertools.count():
            yield Item(f"#{number}", data=testing.draw_image(seed=number % 50))

    found = run(model, endless(), 3, tokens=4)
    assert [next(found).path for _ in range(5)] == [f"#{n}" for n in range(5)]
    found.close()
    assert threads() == [] and len(model.engine.scheduler) == 0
    assert model.ask(testing.draw_image(seed=3), "describe.", max_new_tokens=4)


def test_a_source_that_blocks_does_not_hold_back_the_end(model: Assistant) -> None:
    free = threading.Event()

    def stuck() -> Iterator[Item]:
        yield from pictured(0)
        free.wait(PATIENCE)
        yield from pictured(1)

    found = run(model, stuck(), 2)
    assert next(found).code is None
    began = time.monotonic()
    found.close()
    assert time.monotonic() - began < PATIENCE / 2
    free.set()
    for thread in threading.enumerate():
        if thread.name == "vlm-arrivals":
            thread.join(PATIENCE)
    assert threads() == []


def test_the_engine_has_as_many_places_as_the_job_asks_for(
    model: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = model.engine.scheduler.max_running
    most = 0
    advance = model.engine._advance

    def watched(old: list[Any], new: list[Any]) -> None:
        nonlocal most
        most = max(most, len(old) + len(new))
        advance(old, new)

    monkeypatch.setattr(model.engine, "_advance", watched)
    ready = [
        model.prepare_ahead(testing.draw_image(seed=n), "x", max_new_tokens=40) for n in range(60)
    ]
    assert len(list(model.run_all(ready, places + 16))) == 60
    assert places < most <= places + 16
    assert model.engine.scheduler.max_running == places
    most = 0
    assert len(list(model.run_all(ready[:20], 3))) == 20
    assert most == 3
