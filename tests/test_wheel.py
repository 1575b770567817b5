"""What people get who install the project: built from the tracked files, opened, run."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"vlm", "train", "serve", "data_recipes"}
REJECTED = {"__pycache__", ".ruff_cache", ".mypy_cache"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy: a build leaves folders behind that would be shipped by the next."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests"):  # the tests are beside the packages and must stay out
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*REJECTED))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_top_level_names(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names(wheel)} == PACKAGES


def test_every_file_of_the_packages_is_shipped(wheel: Path) -> None:
    """Code and data alike: a new subpackage or data file must be listed in pyproject.toml."""
    found = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and not REJECTED & set(path.parts)
    }
    assert names(wheel) == found


def test_it_is_never_uploaded_by_mistake(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        assert "Classifier: Private :: Do Not Upload" in archive.read(metadata).decode()


def test_installed_wheel_runs_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "train.py").write_text("raise SystemExit('the wrong train')\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    script = site / "bin" / "vlm"
    assert script.is_file()

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=elsewhere,
            env={"PYTHONPATH": str(site), "PATH": "", "HOME": str(tmp_path), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    places = run("-P", "-c", "import vlm, train, serve, data_recipes as d; print(vlm, train, d)")
    assert places.count(str(site)) == 3
    assert "caption" in run("-P", str(script), "--help")
    built = run("-P", str(script), "data", "build", "scenes", "--num", "2", "--out", "scenes")
    assert "records.jsonl" in built.replace("\n", "")
    assert run("-P", str(script), "train", "--list").strip()
