"""JSON lists of any length: `json` is the oracle, wherever the chunks are cut."""

import io
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from data_recipes.formats import json_list
from data_recipes.formats.faults import FaultError
from data_recipes.formats.json_list import list_items

SIGNS = 'ab"\\\n\u00e9\U0001f600\ud83d,]}[{'


def value(dice: random.Random, depth: int = 0) -> Any:
    def several() -> range:
        return range(dice.randrange(4))

    kinds: list[Callable[[], Any]] = [
        lambda: dice.randrange(10 ** dice.randrange(1, 25)),
        lambda: dice.random() * 10 ** dice.randrange(-20, 20),
        lambda: dice.choice([True, None, False, -0.5, 1e300]),
        lambda: "".join(dice.choice(SIGNS) for _ in range(dice.randrange(30))),
        lambda: [value(dice, depth + 1) for _ in several()],
        lambda: {str(i): value(dice, depth + 1) for i in several()},
    ]
    return dice.choice(kinds if depth < 3 else kinds[:4])()


def cut_short(data: bytes) -> tuple[list[Any], FaultError]:
    """What is given before the error, and the error."""
    found: list[Any] = []
    with pytest.raises(FaultError) as error:
        found.extend(list_items(io.BytesIO(data)))
    return found, error.value


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, 2**20])
def test_values_and_cut_values(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "_CHUNK", chunk)
    dice = random.Random(chunk)
    for _ in range(100):
        wanted = [value(dice) for _ in range(dice.randrange(5))]
        data = json.dumps(wanted, indent=dice.choice([None, 1])).encode()
        assert list(list_items(io.BytesIO(data))) == wanted
        found, _ = cut_short(data[: dice.randrange(len(data))])
        assert found == wanted[: len(found)] or found[:-1] == wanted[: len(found) - 1]


@pytest.mark.parametrize(
    ("text", "code", "line", "number"),
    [
        (b"", "truncated", 1, 0),
        (b"[1, 2\n", "truncated", 2, 2),
        (b'[1,\n"x', "truncated", 2, 1),
        (b"[1,\n2 3]", "malformed", 2, 2),
        (b"[1,\n]", "malformed", 2, 1),
        (b"[1]\n2", "malformed", 2, 1),
        (b"[1,\n{oops}]", "malformed", 2, 1),
        (b'[1,\n"Gr\xf6\xdfe"]', "encoding", 2, 1),
        (b"[" * 100_000, "malformed", 1, 0),
    ],
)
def test_the_place_of_an_error(text: bytes, code: str, line: int, number: int) -> None:
    found, error = cut_short(text)
    assert (error.code, error.line, len(found)) == (code, line, number)
