"""Records with bad pictures: passed over, written down once, and never replaced."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train.run
from train.collate import DialogueCollator
from train.quarantine import TOLD, BadRecord, Quarantine, QuarantineFile, allowed
from train.run import Interrupted, run
from train.trainer import StageTrainer
from vlm.checkpoint import load_checkpoint
from vlm.errors import ErrorLimitError, RecordError
from vlm.messages import Record, assistant, parse_record, user
from vlm.testing import draw_image

Recipe = Callable[..., str]
NUM_RECORDS = 12
MISSING, DAMAGED = 3, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture for each record, but one is missing and one cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_RECORDS):
        draw_image(seed=number).save(folder / f"{number}.png")
    (folder / f"{MISSING}.png").unlink()
    whole = (folder / f"{DAMAGED}.png").read_bytes()
    (folder / f"{DAMAGED}.png").write_bytes(whole[: len(whole) // 2])
    return folder


def lines_of(folder: Path, numbers: list[int]) -> Path:
    lines = []
    for number in numbers:
        asked = [{"type": "image"}, {"type": "text", "text": f"what is {number}?"}]
        turns = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": "x" * (number + 1)}]},
        ]
        line = {"id": f"r{number}", "images": [f"{number}.png"], "messages": turns}
        lines.append(json.dumps(line))
    path = folder / f"records-{'-'.join(map(str, numbers))}.jsonl"
    path.write_text("\n".join(lines))
    return path


def records_of(folder: Path, numbers: list[int]) -> list[Record]:
    lines = lines_of(folder, numbers).read_text().splitlines()
    return [parse_record(line, folder, "here") for line in lines]


def test_the_batch_is_that_of_the_good_records(llava: str, pictures: Path) -> None:
    collate = DialogueCollator(load_checkpoint(llava)[1])
    good = records_of(pictures, [0, 1])
    batch = Quarantine(collate, good)(records_of(pictures, [0, MISSING, 1, DAMAGED]))
    told = batch.pop(TOLD)
    assert told.ids == ("r0", "r3", "r1", "r8") and not told.weightless
    assert [(bad.id, Path(bad.file).name, bad.code) for bad in told.bad] == [
        ("r3", "3.png", "missing"),
        ("r8", "8.png", "truncated"),
    ]
    expected = collate(good)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_a_batch_of_bad_records_learns_nothing(llava: str, pictures: Path) -> None:
    collate = DialogueCollator(load_checkpoint(llava)[1])
    data = records_of(pictures, [MISSING, 5])
    batch = Quarantine(collate, data)(records_of(pictures, [MISSING, DAMAGED]))
    assert batch[TOLD].weightless and len(batch[TOLD].bad) == 2
    assert torch.equal(batch["input_ids"], collate(data[1:])["input_ids"])
    assert (batch["labels"] == -100).all()


def test_only_pictures_are_a_reason(llava: str, pictures: Path) -> None:
    collate = Quarantine(DialogueCollator(load_checkpoint(llava)[1]), [])
    unanswered = Record("u", (), (user("hi"),))
    for records in ([unanswered], [unanswered, *records_of(pictures, [MISSING])]):
        with pytest.raises(RecordError, match="record u has no answer"):
            collate(records)
    too_long = Record("long", (), (user("hi"), assistant("x" * 600)))
    with pytest.raises(RecordError, match="record long"):
        collate([too_long])


def recipe_for(out: Path, recipe: Recipe, llava: str, data: Path, **values: Any) -> str:
    lora = {"r": 2, "alpha": 4, "dropout": 0.1}
    fixed = {"stage": "instruct", "model": {"start": llava}, "data": [str(data)], "lora": lora}
    return recipe(out, **fixed | {"batch_size": 2, "log_steps": 1} | values)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def losses(folder: Path) -> list[float]:
    rows = json.loads((folder / "history.json").read_text())
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_passes_over_them_and_learns_as_without_them(
    llava: str, pictures: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = lines_of(pictures, list(range(NUM_RECORDS)))
    rest = lines_of(pictures, [n for n in range(NUM_RECORDS) if n not in (MISSING, DAMAGED)])
    # One step an epoch: what is dropped moves no other record into another batch.
    one_batch = {"batch_size": NUM_RECORDS, "epochs": 3, "lora": None, "learning_rate": 1e-3}
    run(recipe_for(tmp_path / "without", recipe, llava, rest, **one_batch))
    capsys.readouterr()
    out = run(recipe_for(tmp_path / "with", recipe, llava, everything, **one_batch))
    assert "2 records were passed over" in " ".join(capsys.readouterr().out.split())
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {row["id"]: row["code"] for row in rows} == {"r3": "missing", "r8": "truncated"}
    assert all(str(pictures) in row["file"] and row["reason"] for row in rows) and len(rows) == 2
    assert losses(out) == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_it_is_the_same_after_a_stop_and_with_workers(
    llava: str, pictures: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lines_of(pictures, list(range(NUM_RECORDS)))
    # Some steps have no usable record at all.
    values = {"batch_size": 1, "epochs": 2}
    whole = run(recipe_for(tmp_path / "whole", recipe, llava, data, **values))
    path = recipe_for(tmp_path / "out", recipe, llava, data, num_workers=2, **values)
    waiting = [signal.SIGTERM]

    class Struck(StageTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            while waiting and self.state.global_step == 7:
                signal.raise_signal(waiting.pop())
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(train.run, "StageTrainer", Struck)
    with pytest.raises(Interrupted):
        run(path)
    with (tmp_path / "out" / "quarantine.jsonl").open("a") as file:
        file.write('{"id": "r4", "fi')  # as a kill leaves it
    run(path)
    assert weights(tmp_path / "out") == weights(whole)
    told = [(folder / "quarantine.jsonl").read_bytes() for folder in (whole, tmp_path / "out")]
    assert told[0] == told[1] and told[0].count(b"\n") == 2


def test_too_many_stop_the_run(llava: str, pictures: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    numbers = list(range(NUM_RECORDS))
    for number in numbers[1:]:
        (folder / f"{number}.png").unlink(missing_ok=True)
    path = recipe_for(tmp_path / "out", recipe, llava, lines_of(folder, numbers), save_steps=1)
    with pytest.raises(ErrorLimitError, match="11 of 12 records have bad pictures"):
        run(path)
    for number in numbers[1:]:
        draw_image(seed=number).save(folder / f"{number}.png")
    out = run(path)  # what was mended counts no longer
    assert (out / "quarantine.jsonl").read_bytes() == b""


def test_the_limit_grows_with_the_data(tmp_path: Path) -> None:
    assert (allowed(5), allowed(1000), allowed(665_000)) == (10, 20, 6660)
    file = QuarantineFile(tmp_path / "q.jsonl", 5)
    bad = [BadRecord(str(n), "/absent.png", "missing", "gone") for n in range(11)]
    file.add(bad[:10] + bad[:3])
    file.add(bad[:10])
    assert len(file) == 10
    with pytest.raises(ErrorLimitError):
        file.add(bad)
    assert len(QuarantineFile(tmp_path / "q.jsonl", 5)) == 11
