"""README and docs: commands that the command line takes, links and files that exist."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from serve.cli import app, split_jobs
from train.config import load_config
from vlm.messages import parse_record

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every ``vlm`` command of shell blocks and of inline code, as words."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"(?<!`)`(vlm [^`]+)`(?!`)", text)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    words = [shlex.split(" ".join(line.split()), comments=True) for line in [*inline, *lines]]
    return [each for each in words if each[:1] == ["vlm"]]


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters that the command line makes of these words; nothing is run."""
    command, parent = get_command(app), None
    name, rest = words[0], words[1:]
    while hasattr(command, "resolve_command"):
        parent = command.make_context(name, rest[:1], parent=parent, resilient_parsing=True)
        found, command, rest = command.resolve_command(parent, rest)
        assert command is not None, words
        name = str(found)
    return dict(command.make_context(name, list(rest), parent=parent).params)


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 15


@pages
def test_commands_are_what_the_command_line_takes(page: Path) -> None:
    for words in commands(page):
        if len(words) == 2 or any(word.isupper() or word.startswith("[") for word in words):
            continue  # a name in a sentence, or a form such as `vlm train RECIPE [key=value ...]`
        given = parse(words)
        if words[1] == "train":
            for recipe, overrides in split_jobs(given["arguments"] or []):
                load_config(recipe, overrides)


@pages
def test_python_is_python_and_records_are_records(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "json"):
        line = json.dumps(json.loads(block))
        assert parse_record(line, ROOT, page.name).messages


@pages
def test_links_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make\s([\w-]+)`", text):
        assert target in rules, target


def test_the_file_tree_names_every_module() -> None:
    """A new module gets its phrase in the README, or stands in a line with others."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("## What is where")[2].split("```")[1]
    for package in ("vlm", "train", "serve"):
        for path in (ROOT / package).glob("*.py"):
            if path.name != "__init__.py":
                assert re.search(rf"\b{re.escape(path.name)}", tree), path
