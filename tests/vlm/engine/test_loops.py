"""Loops: against a search by brute force, and texts that are none."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.engine.loops import MAX_PERIOD, LoopDetector
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.messages import user

often = settings(derandomize=True, deadline=None, max_examples=200)


def loops(ids: Sequence[int]) -> bool:
    """Whether the end of a list is at least 4 times, and 48 tokens, of one sequence."""
    for period in range(1, 129):
        size = max(48, 4 * period)
        if size > len(ids):
            break
        tail = list(ids[-size:])
        if tail[period:] == tail[:-period]:
            return True
    return False


def found_at(ids: Sequence[int]) -> int | None:
    """After how many tokens the detector speaks up."""
    detector = LoopDetector()
    return next((i for i, token in enumerate(ids, 1) if detector.add(token)), None)


# Pieces of periodic sequences of few different tokens, one after the other.
stretches = st.lists(
    st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(1, 60)),
    min_size=1,
    max_size=4,
)


@often
@given(stretches)
def test_a_loop_is_found_at_its_first_token_too_many(
    parts: list[tuple[list[int], int]],
) -> None:
    ids = [token for words, times in parts for token in (words * times)[:150]]
    expected = next((n for n in range(len(ids) + 1) if loops(ids[:n])), None)
    assert found_at(ids) == expected


@pytest.mark.parametrize("period", [1, 2, 5, 11, 12, 13, 40, 127, 128])
def test_periods_of_all_lengths(period: int) -> None:
    intro, words = list(range(1000, 1030)), list(range(period))
    size = max(48, 4 * period)
    ids = [*intro, *(words * 600)[: size + 5]]
    assert found_at(ids) == len(intro) + size


def test_longer_periods_are_left_alone() -> None:
    assert found_at(list(range(MAX_PERIOD + 1)) * 9) is None


def test_inner_repeats_do_not_hide_a_loop() -> None:
    words = [1, 1, 2, 1, 1, 2, 2, 1, 3]
    assert found_at(words * 9) == 48


def test_one_different_token_starts_the_count_anew() -> None:
    assert found_at([7] * 47) is None
    assert found_at([*[7] * 47, 8, *[7] * 47]) is None
    assert found_at([*[7] * 47, 8, *[7] * 48]) == 96


@pytest.mark.parametrize(
    "text",
    [
        "no, no, no, no, no, no!",
        "ha " * 15,
        "".join(f"{n}. a red cube\n" for n in range(1, 60)),
        ", ".join(str(n) for n in range(300)),
        "| a | b |\n| - | - |\n" + "".join(f"| {n} | {n * n} |\n" for n in range(40)),
        "A red cube is left of a blue ball. " * 3,
        "abcdefghijklmnopqrstuvwxyz" * 3,
        "0" * 40 + "1" + "0" * 40,
    ],
)
def test_lists_and_short_repetition_are_none(text: str) -> None:
    assert found_at(testing.byte_tokenizer().encode(text, add_special_tokens=False)) is None


# The engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = testing.tiny_llava_folder(tmp_path_factory.mktemp("loops") / "tiny")
    return Engine(*load_checkpoint(folder))


def request(engine: Engine, **sampling: bool) -> Request:
    prompt = engine.processor.encode([user("what?")], add_generation_prompt=True)
    # Rewarded for what is there already, any model goes round in circles.
    return Request(prompt, Sampling(300, repetition_penalty=0.1, **sampling))


def test_an_answer_in_a_loop_ends_and_says_why(engine: Engine) -> None:
    whole, ended = engine.generate([request(engine, stop_loops=False), request(engine)])
    assert (len(whole.ids), whole.finish_reason) == (300, "length")
    assert ended.finish_reason == "repetition" and 48 <= len(ended.ids) < 300
    assert ended.ids == whole.ids[: len(ended.ids)]
    assert loops(ended.ids) and not loops(ended.ids[:-1])
