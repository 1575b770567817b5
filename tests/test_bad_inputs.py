"""docs/bad-inputs.md: every case has its line, and every test that a line names exists."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bad-inputs.md"
CASES = [*range(1, 51), *range(56, 65)]


def lines() -> list[list[str]]:
    """The cells of every row of the table, its two heads left out."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


@cache
def defined_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_case_has_one_line_with_all_cells_filled() -> None:
    assert [int(cells[0]) for cells in lines()] == CASES
    assert all(len(cells) == 4 and all(cells) for cells in lines())


def test_every_test_that_is_named_exists() -> None:
    for number, _, _, named in lines():
        tests = re.findall(r"`([^`]+)`", named)
        assert tests, number
        for test in tests:
            file, _, name = test.partition("::")
            assert name.startswith("test_"), test
            assert name in defined_in(ROOT / "tests" / file), test


def test_codes_on_the_page_are_those_of_the_gate_and_the_api() -> None:
    from vlm.captioning import CaptionResult
    from vlm.images import load_image

    known = set(re.findall(r"``\"?(\w+)\"?``", f"{load_image.__doc__} {CaptionResult.__doc__}"))
    for path in (ROOT / "serve" / "api").glob("*.py"):
        known |= set(re.findall(r'"([a-z]+_[a-z_]+)"', path.read_text(encoding="utf-8")))
    for number, _, told, _ in lines():
        for code in re.findall(r"`([a-z]+_[a-z_]+)`", told):
            assert code in known | {"finish_reason"}, (number, code)
