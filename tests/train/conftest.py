"""Drawn scenes, tiny parts and recipes for the training tests."""

import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import train.run
from data_recipes.scenes import build
from train.trainer import StageTrainer
from vlm.testing import tiny_language_folder, tiny_llava_folder, tiny_vision_folder

Strike = Callable[..., None]


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Strike:
    """``strike(step, *signals)``: they arrive once, while that step of the next run is made."""

    def arm(step: int, *signals: int) -> None:
        waiting = list(signals)

        class Struck(StageTrainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                while waiting and self.state.global_step == step:
                    signal.raise_signal(waiting.pop())
                return super().training_step(*args, **kwargs)

        monkeypatch.setattr(train.run, "StageTrainer", Struck)

    return arm


@pytest.fixture(scope="session")
def write_records() -> Callable[..., str]:
    """Writes records of one question each, (pictures, question, answer), and returns the path."""

    def write(folder: Path, rows: Iterable[tuple[list[str], str, str]]) -> str:
        lines = []
        for number, (images, question, answer) in enumerate(rows):
            asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
            said = [{"type": "text", "text": answer}]
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            lines.append(json.dumps({"id": str(number), "images": images, "messages": turns}))
        path = folder / "records.jsonl"
        path.write_text("\n".join(lines))
        return str(path)

    return write


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The records file of a few scenes; the same task is built once."""
    built: dict[str, str] = {}

    def make(task: str, num: int = 8) -> str:
        if task not in built:
            out = tmp_path_factory.mktemp(task)
            built[task] = str(build(num, 0, out, task=task, turns=2, max_objects=2, side=32))
        return built[task]

    return make


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a tiny vision tower and a tiny language model."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "vision": str(tiny_vision_folder(folder / "vision")),
        "language": str(tiny_language_folder(folder / "language")),
    }


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA folder."""
    return str(tiny_llava_folder(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="session")
def recipe() -> Callable[..., str]:
    """Writes a recipe beside its output folder and returns its path."""

    def write(output: Path, **values: Any) -> str:
        defaults = {"output": str(output), "learning_rate": 0.01, "batch_size": 2}
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(defaults | values), encoding="utf-8")
        return str(path)

    return write
