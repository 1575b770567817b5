"""Scores: what counts as right, how sure a number is, and how a report reads."""

import json
import math
from typing import Any

import pytest

from vlm.scoring import (
    Question,
    Report,
    compare,
    is_correct,
    normalise,
    score,
    verdict,
    wilson,
)

# Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("correct", "n", "low", "high"), NEWCOMBE)
def test_the_interval_is_the_published_one(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - correct, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_the_interval_inverts_the_score_test(n: int) -> None:
    """Each end p satisfies |k/n - p| = z sqrt(p (1 - p) / n), Wilson's own definition."""
    z = 1.959963984540054
    for correct in {0, 1, n // 2, n}:
        for end in wilson(correct, n):
            distance = abs(correct / n - end)
            assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-7)
        low, high = wilson(correct, n)
        rounding = 1e-12
        assert 0 <= low <= correct / n + rounding and correct / n - rounding <= high <= 1


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5), (1, -1)])
def test_what_is_no_proportion_is_refused(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(correct, n)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red  Dog.", "red dog"),
        ("  a dog and an apple !", "dog and apple"),
        ("theatre", "theatre"),
        ("banana", "banana"),
        ("two.", "two"),
        ("3.5", "3.5"),
        ("top left,\n", "top left"),
        ("", ""),
        ("A", "a"),  # an option of a multiple-choice question, and no article
        ("A.", "a"),
        ("the", "the"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("no, there is none", "no"),
        ("The dog is top left, the cat bottom left: yes.", "yes"),
        ("yes, there is no dog", "yes"),
        ("there are yes and no in here", None),
        ("nothing", None),
        ("yesterday", None),
        ("", None),
        ("...", None),
    ],
)
def test_verdict(text: str, expected: str | None) -> None:
    assert verdict(text) == expected


@pytest.mark.parametrize(
    ("given", "reference", "expected"),
    [
        ("The dog.", "dog", True),
        ("a dog", "the dog", True),
        ("dogs", "dog", False),
        ("a red dog", "dog", False),
        ("Yes, it is.", "yes", True),
        ("yes", "No.", False),
        ("I do not know", "no", False),
        ("no", "nothing", False),
        ("", "dog", False),
        ("", "A", False),
        ("The", "A", False),
        ("a.", "A", True),
    ],
)
def test_what_is_right(given: str, reference: str, expected: bool) -> None:
    assert is_correct(given, reference) is expected


def question(kind: str, answer: str) -> Question:
    return Question(record="r", image="r.png", text=f"{kind}?", answer=answer, kind=kind)


def small_report(**options: Any) -> Report:
    questions = [
        question("where", "top left"),
        question("is", "yes"),
        question("where", "Top left."),
        question("is", "no"),
        question("where", "top right"),
        question("is", "no"),
        question("is", "no"),
    ]
    answers = ["top left", "yes", "top right", "yes", "top right", "no", "maybe"]
    return score(questions, answers, **options)


def test_answers_are_counted_by_kind() -> None:
    found = small_report(model="m")
    yes_no, where = found.kinds
    assert (yes_no.kind, yes_no.n, yes_no.correct, yes_no.majority) == ("is", 4, 2, 3)
    assert (where.kind, where.n, where.correct, where.majority) == ("where", 3, 2, 2)
    whole = found.overall
    assert (whole.kind, whole.n, whole.correct, whole.majority) == ("overall", 7, 4, 5)
    assert whole.accuracy == 4 / 7 and whole.interval == wilson(4, 7)


def test_the_yes_ratio_is_of_yes_no_kinds_alone() -> None:
    found = small_report()
    assert [kind.yes_ratio for kind in (*found.kinds, found.overall)] == [0.5, None, None]


def test_answers_and_questions_must_pair_up() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score([question("a", "b")] * 2, ["b"])


def test_the_report_as_json() -> None:
    found = small_report(model="m", control="blank picture")
    plain = json.loads(found.to_json())
    assert (plain["model"], plain["control"]) == ("m", "blank picture")
    assert [kind["kind"] for kind in plain["kinds"]] == ["is", "where"]
    assert plain["overall"] == {
        "kind": "overall",
        "n": 7,
        "correct": 4,
        "accuracy": 4 / 7,
        "interval": list(wilson(4, 7)),
        "majority_accuracy": 5 / 7,
        "majority_interval": list(wilson(5, 7)),
        "yes_ratio": None,
    }
    assert "answers" not in plain
    answers = json.loads(found.to_json(with_answers=True))["answers"]
    assert sum(answer["correct"] for answer in answers) == 4
    assert answers[2] == {
        "record": "r",
        "image": "r.png",
        "text": "where?",
        "answer": "Top left.",
        "kind": "where",
        "given": "top right",
        "correct": False,
    }


def test_the_report_as_text() -> None:
    lines = str(small_report(model="small model")).splitlines()
    assert lines[0].strip() == "small model"
    [row] = [line for line in lines if "where" in line]
    assert "66.7 % [20.8, 93.9]" in row
    [row] = [line for line in lines if " is " in line]
    assert "50.0 % [15.0, 85.0]" in row and "75.0 % [30.1, 95.4]" in row and "0.50" in row
    assert any("overall" in line and "57.1 % [25.0, 84.2]" in line for line in lines)


def test_reports_stand_side_by_side() -> None:
    table = compare([small_report(model="m"), small_report(model="m", control="blank picture")])
    assert table.title == "m"
    headers = [str(column.header) for column in table.columns]
    assert headers == ["kind", "n", "accuracy", "blank picture", "majority answer", "yes-ratio"]
    assert list(table.columns[0].cells) == ["is", "where", "overall"]
    assert list(table.columns[-1].cells) == ["0.50 / 0.50", "", ""]
