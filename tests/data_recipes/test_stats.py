"""What `stats` counts, against numbers that were worked out by hand or by numpy."""

import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest

import data_recipes.stats
from data_recipes.stats import Names, Spread, stats
from vlm.errors import MessageError, RecordError
from vlm.messages import Message, Record, TextPart, assistant, user


class Words:
    """A processor: one token a word, three a picture; answers are learnt."""

    num_visual_tokens, context_length = 3, 14

    def encode_ids(self, messages: Any) -> tuple[list[int], list[bool]]:
        mask: list[bool] = []
        for message in messages:
            if message.role == "system":
                raise MessageError("no system message here")
            number = 3 * len(message.images) + len(message.text.split())
            mask += [message.role == "assistant"] * number
        return [0] * len(mask), mask


RECORDS = [
    Record(
        "1",
        ("a.png",),
        (user("what is it?", "a.png"), assistant("A cat."), user("red?"), assistant("a CAT")),
        source="coco",
        license="CC0",
    ),
    Record("2", (), (user("say much"), assistant("word " * 20)), source="coco"),
    Record("3", ("b.png", "c.png"), (user("one more question", "b.png", "c.png"),)),
    Record("4", ("d.png",)),
]


def test_counts_are_those_made_by_hand() -> None:
    found = stats(RECORDS, Words()).summary()
    counts = ("records", "with_pictures", "without_pictures", "without_answers")
    assert [found[name] for name in counts] == [4, 3, 1, 2]
    assert found["per_record"]["turns"]["sum"] == 4
    assert found["per_record"]["pictures"]["sum"] == 4
    words = {"sum": 33, "mean": 8.25, "min": 0, "median": 3, "p95": 22, "max": 22}
    assert found["per_record"]["words"] == words
    assert found["per_record"]["tokens"]["sum"] == 33 + 3 * 3  # no turns, no tokens
    assert found["per_record"]["learnt tokens"]["sum"] == 4 + 20
    assert found["per_turn"]["question words"]["sum"] == 3 + 1 + 2 + 3
    assert found["per_turn"]["answer words"]["max"] == 20
    assert (found["visual_tokens"], found["too_long"], found["long_answers"]) == (9, 1, 1)
    assert found["short_answers"]["commonest"] == {"a cat": 2}
    assert found["sources"]["commonest"] == {"coco": 2, "(none)": 2}
    assert found["licenses"]["commonest"] == {"(none)": 3, "CC0": 1}
    assert json.loads(json.dumps(found)) == found


def test_without_a_processor_no_token_is_told() -> None:
    found = stats(RECORDS).summary()
    assert set(found["per_record"]) == {"turns", "pictures", "words"}
    assert "visual_tokens" not in found
    assert stats([]).summary()["per_record"]["words"]["mean"] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.95, 1.0])
def test_quantiles_are_numpys(share: float) -> None:
    dice = random.Random(1)
    values = [dice.randrange(50) for _ in range(333)]
    spread = Spread()
    for value in values:
        spread.add(value)
    assert spread.quantile(share) == np.quantile(values, share, method="inverted_cdf")
    assert (len(spread), spread.sum) == (333, sum(values))


def test_names_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_recipes.stats, "_MOST_DIFFERENT", 2)
    names = Names()
    for name in "abcabd":
        names.add(name)
    assert names.summary() == {
        "total": 6,
        "different": 2,
        "others": 2,
        "commonest": {"a": 2, "b": 2},
    }


def test_a_record_that_a_template_refuses_is_named() -> None:
    system = Message("system", (TextPart("be short"),))
    record = dataclasses.replace(RECORDS[0], id="x", messages=(system, *RECORDS[0].messages))
    assert stats([record]).records == 1
    with pytest.raises(RecordError, match="record 'x': no system message here"):
        stats([record], Words())
