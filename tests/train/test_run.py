"""A run's folder: what it tells, and that it belongs to one recipe."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.collate import DialogueCollator
from train.config import load_config
from train.dataset import RecordDataset
from train.run import run
from vlm.checkpoint import load_checkpoint
from vlm.errors import ConfigError, RecordError
from vlm.history import read_history

Recipe = Callable[..., str]
Scenes = Callable[..., str]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, scenes: Scenes, llava: str
) -> str:
    """The recipe of a run that learnt eight records by heart, and is done."""
    data = scenes("instruct")
    path = recipe(
        tmp_path_factory.mktemp("runs") / "finished",
        stage="instruct",
        data=[data],
        eval_data=data,
        eval_steps=6,
        model={"start": llava},
        batch_size=8,
        epochs=12,
        schedule="constant",
        log_steps=1,
    )
    run(path)
    return path


def test_a_run_learns_and_tells_how_it_went(finished: str) -> None:
    config = load_config(finished)
    output = Path(config.output)
    history = json.loads((output / "history.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    (record,) = read_history(output)
    data = RecordDataset(config.data)
    assert (record["stage"], record["steps"]) == ("instruct", 12)
    facts = {"files": config.data, "records": len(data), "sha256": data.fingerprint()}
    assert record["data"] == facts
    assert record["losses"]["training"] == losses[-1]
    assert [part["role"] for part in record["parts"]] == ["FROZEN", "TRAINABLE", "TRAINABLE"]
    assert load_config(str(output / "run.yaml")) == config
    assert (output / "curves.png").is_file() and not (output / "checkpoints").exists()


def test_the_held_out_loss_is_that_of_the_written_model(finished: str) -> None:
    config = load_config(finished)
    history = json.loads((Path(config.output) / "history.json").read_text())
    held_out = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    data = RecordDataset(config.data)
    model, processor = load_checkpoint(config.output)
    batch = DialogueCollator(processor)([data[i] for i in range(len(data))])
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert [step for step, _ in held_out] == [6, 12]
    assert abs(held_out[-1][1] - loss) < 1e-4 * loss


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and bytes of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_run_is_returned_as_it_is(finished: str) -> None:
    output = Path(load_config(finished).output)
    before = contents(output)
    assert run(finished) == output
    assert contents(output) == before


def test_another_recipe_on_the_same_folder_is_refused(finished: str) -> None:
    output = Path(load_config(finished).output)
    before = contents(output)
    for override in ("learning_rate=0.02", "model.start=elsewhere", "lora.r=4", "seed=1"):
        with pytest.raises(ConfigError, match="belongs to another run"):
            run(finished, [override])
    assert contents(output) == before


def test_bad_data_is_named(recipe: Recipe, scenes: Scenes, llava: str, tmp_path: Path) -> None:
    line = {"id": "bad", "messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "bad.jsonl").write_text(json.dumps(line))
    values = {"stage": "instruct", "model": {"start": llava}, "max_steps": 1}
    absent = recipe(tmp_path / "out", data=[str(tmp_path / "absent.jsonl")], **values)
    with pytest.raises(RecordError, match=r"absent\.jsonl"):
        run(absent)
    assert not (tmp_path / "out").exists()  # told before anything is written
    with pytest.raises(RecordError, match="record bad has no answer"):
        run(recipe(tmp_path / "out", data=[str(tmp_path / "bad.jsonl")], **values))
    # Nothing was learnt in that folder, so the corrected recipe may have it.
    assert run(recipe(tmp_path / "out", data=[scenes("instruct")], **values)).is_dir()
