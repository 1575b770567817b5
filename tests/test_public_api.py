"""The names that users write, and what ``import vlm`` costs."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import vlm

ROOT = Path(__file__).parents[1]
NAMES = [
    "Assistant",
    "CaptionResult",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "DivergenceError",
    "ErrorLimitError",
    "GenerationError",
    "ImageError",
    "Message",
    "MessageError",
    "MissingExtraError",
    "QueueFullError",
    "Record",
    "RecordError",
    "VlmError",
    "__version__",
    "caption_images",
    "compose",
    "load",
    "load_image",
]
HOMES = {
    "Assistant": "vlm.assistant",
    "CaptionResult": "vlm.captioning",
    "Message": "vlm.messages",
    "Record": "vlm.messages",
    "caption_images": "vlm.caption_job",
    "compose": "vlm.checkpoint",
    "load": "vlm.assistant",
    "load_image": "vlm.images",
}
HEAVY = ["torch", "transformers", "numpy", "gradio", "peft", "datasets", "PIL"]


def loaded_after(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint('LOADED', *(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_public_names_are_pinned_and_sorted() -> None:
    assert vlm.__all__ == NAMES == sorted(NAMES)
    assert set(NAMES) <= set(dir(vlm))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_comes_from_its_home(name: str) -> None:
    if name == "__version__":
        assert vlm.__version__.count(".") == 2
    else:
        home = import_module(HOMES.get(name, "vlm.errors"))
        assert getattr(vlm, name) is getattr(home, name)


def test_unknown_names_are_told() -> None:
    with pytest.raises(AttributeError, match="'vlm' has no attribute 'nonsense'"):
        _ = vlm.nonsense
    with pytest.raises(ImportError):
        exec("from vlm import nonsense")


def test_every_error_is_public() -> None:
    errors = import_module("vlm.errors")
    tree = {name for name in vars(errors) if name.endswith("Error")}
    assert tree <= set(NAMES)


def test_import_vlm_loads_nothing_heavy() -> None:
    assert loaded_after("import vlm") == set()
    assert loaded_after("import vlm; vlm.VlmError; vlm.__version__") == set()
    assert loaded_after("import vlm; vlm.load_image; vlm.Message") <= {"PIL"}
    assert loaded_after("import data_recipes.scenes, train.config") <= {"PIL", "numpy"}


@pytest.mark.parametrize("command", [[], ["ask"], ["caption"], ["train"], ["data"], ["serve"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        f"sys.argv = ['vlm', *{command!r}, '--help']\n"
        "from serve.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code"
    )
    assert loaded_after(code) == set()


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "vlm.__version__"
