"""The shape of the code, read from its syntax: who may import whom, how long files are."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vlm", "train", "serve", "data_recipes")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The star: everything knows vlm, and vlm knows nobody.
ALLOWED = {name: {name, "vlm"} for name in PACKAGES}
MEETING_POINT = ROOT / "serve" / "cli.py"

# Usable, and quick to start, on a machine where torch would take seconds to load.
TORCH_FREE = [
    *(ROOT / "data_recipes").rglob("*.py"),
    *(ROOT / name for name in ("vlm/__init__.py", "vlm/errors.py", "vlm/messages.py")),
    *(ROOT / "vlm").glob("image*.py"),
    *(ROOT / name for name in ("serve/cli.py", "serve/session.py", "train/config.py")),
]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "gradio", "bitsandbytes"}


def imports(path: Path, *, at_start_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `at_start_only` leaves out those inside functions."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if at_start_only and (is_function(node) or is_typing_only(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            assert node.module is not None
            yield node.module
        todo.extend(ast.iter_child_nodes(node))


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_meet_in_vlm_alone(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package]
    if path == MEETING_POINT:
        allowed = set(PACKAGES)
        at_start = {top(name) for name in imports(path, at_start_only=True)}
        assert at_start & set(PACKAGES) <= {"vlm", "serve"}
    assert {top(name) for name in imports(path)} & set(PACKAGES) <= allowed


def loaded_with(path: Path) -> set[str]:
    """Third-party and own names that importing this file loads, through our own files."""
    seen: set[Path] = set()
    names: set[str] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imports(file, at_start_only=True):
            names.add(top(name))
            stem = ROOT.joinpath(*name.split("."))
            todo += [at for at in (stem.with_suffix(".py"), stem / "__init__.py") if at.is_file()]
    return names


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: str(path.relative_to(ROOT)))
def test_parts_without_tensors_load_none(path: Path) -> None:
    assert not loaded_with(path) & HEAVY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_subject_a_file(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (FILES, ("quantize", "heic", "deepspeed", "ray", "liger")),
        (TESTS, ("quantize", "heic", "deepspeed", "tensorboard", "ray", "test")),
    ],
    ids=["packages", "tests"],
)
def test_every_import_is_a_declared_dependency(files: list[Path], extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    declared = {line.partition(">")[0].lower().replace("_", "-") for line in lines}
    homes = packages_distributions()
    wanted = {top(name) for path in files for name in imports(path)}
    wanted -= set(sys.stdlib_module_names) | set(PACKAGES)
    for name in sorted(wanted):
        found = {home.lower().replace("_", "-") for home in homes.get(name, [name])}
        assert found & declared, f"{name} is imported and not declared in pyproject.toml"


def test_no_package_among_the_tests() -> None:
    """An ``__init__.py`` here would make tests/train shadow train."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
