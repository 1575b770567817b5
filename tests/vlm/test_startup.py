"""The cycle collector is paused while modules load, and left as it was found."""

import gc
from collections.abc import Iterator

import pytest

from vlm.startup import paused_gc, skip_final_gc


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """Whatever a test does, the collector runs afterwards."""
    gc.enable()
    yield
    gc.enable()


def test_the_collector_rests_inside_and_runs_after() -> None:
    with paused_gc():
        assert not gc.isenabled()
        with paused_gc():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with paused_gc():
        pass
    assert not gc.isenabled()


def test_it_runs_again_after_an_error() -> None:
    with pytest.raises(KeyError), paused_gc():
        raise KeyError
    assert gc.isenabled()


def test_objects_are_left_to_the_system_at_the_end() -> None:
    before = gc.get_freeze_count()
    try:
        skip_final_gc()
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
