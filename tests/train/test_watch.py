"""A run that is watched learns what it learns unwatched; and what is seen is true."""

import json
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import train.run
from train.gallery import Answered, read_answers
from train.run import Interrupted, run
from train.trackers import check_trackers
from vlm.errors import CheckpointError, ConfigError, MissingExtraError
from vlm.messages import read_records, user
from vlm.processor import Processor

Recipe = Callable[..., str]
Strike = Callable[..., None]
Scenes = Callable[..., str]

# Eight records in batches of 2 x 2 for three epochs: six steps, looked at after 2, 4 and 6.
COMMON: dict[str, Any] = {
    "stage": "instruct",
    "gradient_accumulation": 2,
    "epochs": 3,
    "log_steps": 1,
    "eval_steps": 2,
    "save_steps": 1,
    "learning_rate": 0.003,
    "watch": {"samples": 3, "probes": 4},
}
LORA = {"r": 4, "alpha": 8, "dropout": 0.2}  # dropout draws lots at every step


def history(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((output / "history.json").read_text())
    return rows


def weights(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.safetensors")}


def watched_recipe(output: Path, recipe: Recipe, scenes: Scenes, llava: str, **more: Any) -> str:
    data = scenes("instruct")
    values = {"data": [data], "eval_data": data, "model": {"start": llava}, "lora": LORA}
    return recipe(output, **COMMON | values | more)


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, scenes: Scenes, llava: str
) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    return run(watched_recipe(folder / "out", recipe, scenes, llava))


def test_watching_changes_nothing(
    watched: Path,
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train.run, "watched", lambda *args: nullcontext())
    alone = run(watched_recipe(tmp_path / "out", recipe, scenes, llava))
    assert not (alone / "samples.jsonl").exists()
    assert weights(alone) == weights(watched)
    for key in ("loss", "eval_loss", "grad_norm"):
        rows = [[row[key] for row in history(out) if key in row] for out in (alone, watched)]
        assert rows[0] == rows[1] and len(rows[0]) >= 3, key


def test_it_is_looked_at_with_every_evaluation(watched: Path, scenes: Scenes) -> None:
    answers = read_answers(watched / "samples.jsonl")
    assert [each.step for each in answers] == [2] * 3 + [4] * 3 + [6] * 3
    assert len({each.id for each in answers}) == 3
    known = {record.id: record for record in read_records(scenes("instruct"))}
    for each in answers:
        question, said = known[each.id].messages[:2]
        assert (each.question, each.expected) == (question.text, said.text)
        assert each.images == known[each.id].images and each.error is None
    for key in ("eval_loss", "probe_right", "probe_blank", "probe_other"):
        assert [row["step"] for row in history(watched) if key in row] == [2, 4, 6], key
    assert all("samples_per_second" in row for row in history(watched) if "loss" in row)


@pytest.mark.parametrize("values", [{"lora": None}, {"lora": None, "batches": {"packing": False}}])
def test_the_last_answers_are_those_of_the_result(
    values: dict[str, Any], tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    output = run(watched_recipe(tmp_path / "out", recipe, scenes, llava, **values))
    model = LlavaForConditionalGeneration.from_pretrained(output)
    processor = Processor.from_folder(output)
    last = [each for each in read_answers(output / "samples.jsonl") if each.step == 6]
    assert len(last) == 3
    for each in last:
        prompt = processor.encode([user(each.question, *each.images)], add_generation_prompt=True)
        pictures = [Image.open(path).convert("RGB") for path in each.images]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        ids = torch.tensor([prompt.input_ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=sorted(processor.eos_token_ids),
        )
        expected = processor.decode(out[0, ids.shape[1] :].tolist())
        assert expected and each.answer.startswith(expected)


def test_without_held_out_records_the_training_data_is_asked(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    more = {"eval_data": None, "eval_steps": 4}
    output = run(watched_recipe(tmp_path / "out", recipe, scenes, llava, **more))
    answers = read_answers(output / "samples.jsonl")
    assert [each.step for each in answers] == [4] * 3 + [6] * 3  # and once at the end
    assert not any("probe_right" in row for row in history(output))


def test_a_run_that_goes_on_keeps_what_was_seen_before(
    watched: Path,
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    strike: Strike,
) -> None:
    path = watched_recipe(tmp_path / "out", recipe, scenes, llava)
    strike(2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(path)
    monkeypatch.undo()
    samples = tmp_path / "out" / "samples.jsonl"
    assert [each.step for each in read_answers(samples)] == [2] * 3
    assert "not finished" in (tmp_path / "out" / "report.html").read_text()
    too_far = samples.read_text().splitlines()[0].replace('"step": 2', '"step": 4')
    samples.write_text(samples.read_text() + too_far + "\n")  # as of a run killed before a save
    assert run(path) == tmp_path / "out"
    assert samples.read_bytes() == (watched / "samples.jsonl").read_bytes()
    assert weights(tmp_path / "out") == weights(watched)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not finished" not in page and "step 6 of 6" in page


def test_a_question_without_an_answer_says_why(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    broken = Path(scenes("phrases")).read_text().splitlines()[:3]
    (tmp_path / "images").symlink_to(Path(scenes("phrases")).parent / "images")
    first = json.loads(broken[0]) | {"images": ["nowhere.png"]}
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(first), *broken[1:]]))
    more = {"data": [str(tmp_path / "data.jsonl")], "eval_data": None}
    output = run(watched_recipe(tmp_path / "out", recipe, scenes, llava, **more))
    found: dict[str, Answered] = {e.id: e for e in read_answers(output / "samples.jsonl")}
    assert "nowhere.png" in str(found[first["id"]].error) and not found[first["id"]].answer
    assert [each.error for each in found.values()].count(None) == 2
    assert "nowhere.png cannot be shown" in (output / "report.html").read_text()


def test_a_full_disk_is_told(tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str) -> None:
    (tmp_path / "out" / "samples.tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"samples.jsonl cannot be written"):
        run(watched_recipe(tmp_path / "out", recipe, scenes, llava))


def test_a_tracker_shows_the_history_once(
    tmp_path: Path,
    recipe: Recipe,
    scenes: Scenes,
    llava: str,
    monkeypatch: pytest.MonkeyPatch,
    strike: Strike,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    watch = COMMON["watch"] | {"report_to": ["tensorboard"]}
    path = watched_recipe(tmp_path / "out", recipe, scenes, llava, watch=watch)
    strike(3, signal.SIGTERM)
    with pytest.raises(Interrupted):
        run(path)
    monkeypatch.undo()
    with SummaryWriter(str(tmp_path / "out" / "logs")) as killed:  # before its next checkpoint
        killed.add_scalar("train/loss", 99.0, 5)
    output = run(path)
    board = EventAccumulator(str(output / "logs")).Reload()
    rows = history(output)
    for tag, key in (
        ("train/loss", "loss"),
        ("eval/loss", "eval_loss"),
        ("train/probe_other", "probe_other"),
        ("train/grad_norm_adapter", "grad_norm_adapter"),
        ("train/tokens_per_second", "tokens_per_second"),
    ):
        shown = {event.step: event.value for event in board.Scalars(tag)}
        told = {row["step"]: row[key] for row in rows if key in row}
        assert shown == pytest.approx(told), tag
        assert len(board.Scalars(tag)) == len(told)


def test_trackers_that_there_are_not() -> None:
    check_trackers([])
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(MissingExtraError, match="pip install dvclive"):
        check_trackers(["dvclive"])


def test_a_missing_tensorboard_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm\[tensorboard\]'"):
        check_trackers(["tensorboard"])
