"""A tiny model and folders of drawn pictures, shared by the tests of this package."""

from pathlib import Path

import pytest

from vlm import testing
from vlm.assistant import Assistant, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return testing.tiny_llava_folder(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


@pytest.fixture(scope="module")
def model(folder: Path) -> Assistant:
    return load(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures, the names in the order of the seeds."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(7):
        testing.draw_image(seed=seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Twelve files, the fourth of them no picture."""
    folder = tmp_path / "album"
    folder.mkdir()
    for seed in range(12):
        testing.draw_image(seed=seed).save(folder / f"{seed:02}.png")
    (folder / "03.png").write_text("no picture")
    return folder
