"""Numbers of a step: gradients part by part, and pace against counts by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from train.collate import DialogueCollator
from train.config import LoraConfig, RunConfig
from train.jobs import Job
from train.meter import Meter, part_name
from train.run import run
from train.stages import STAGES, apply_stage
from train.trainer import StageTrainer
from train.watch import watched
from vlm.checkpoint import load_checkpoint
from vlm.messages import Record, assistant, read_records, user
from vlm.testing import draw_image

Recipe = Callable[..., str]
Scenes = Callable[..., str]


def first_numbers(
    tmp_path: Path, llava: str, records: list[Record], lora: LoraConfig | None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The log of one watched step, and the gradients of the same records by hand."""
    config = RunConfig.model_validate(
        {
            "stage": "instruct",
            "output": str(tmp_path),
            "data": ["x"],
            "model": {"start": "x"},
            "lora": lora,
            "learning_rate": 0.01,
            "projector_learning_rate": 0.002,
            "schedule": "constant",
            "warmup_steps": 0,
            "log_steps": 1,
            "batch_size": len(records),
            "max_grad_norm": 0.05,
        }
    )
    model, processor = load_checkpoint(llava)
    report = apply_stage(model, STAGES["instruct"], lora)
    batch = DialogueCollator(processor)(records)
    model(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer = StageTrainer(
        run_config=config,
        model=model,
        data_collator=DialogueCollator(processor),
        train_dataset=records,
    )
    job = Job(model, DialogueCollator(processor), lambda folder, run: None)
    with watched(trainer, config, job, report, Console(quiet=True)):
        trainer.train_from(None)
    return trainer.state.log_history[0], gradients


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    made = []
    for index, answer in enumerate(("a", "red " * 20, "two fish")):
        path = str(tmp_path / f"{index}.png")
        draw_image(seed=index).save(path)
        made.append(Record(str(index), (path,), (user("what?", path), assistant(answer))))
    return made


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, alpha=8, dropout=0.0)])
def test_gradients_are_told_part_by_part_and_before_clipping(
    lora: LoraConfig | None, tmp_path: Path, llava: str, records: list[Record]
) -> None:
    logs, gradients = first_numbers(tmp_path, llava, records, lora)
    inner = "adapter" if lora else "language_model"
    squares = {"projector": 0.0, inner: 0.0}
    for name, gradient in gradients.items():
        part = "projector" if name.startswith("multi_modal_projector.") else inner
        squares[part] += float(gradient.double().square().sum())
    told = {key for key in logs if key.startswith("grad_norm_")}
    assert told == {f"grad_norm_{part}" for part in squares}
    for part, square in squares.items():
        assert logs[f"grad_norm_{part}"] == pytest.approx(square**0.5, rel=1e-4)
    assert sum(squares.values()) ** 0.5 > 0.05  # so that something was clipped
    assert logs["learning_rate_projector"] == 0.002 and logs[f"learning_rate_{inner}"] == 0.01


def test_every_parameter_has_a_part() -> None:
    assert part_name("language_model.model.layers.0.mlp.up_proj.lora_A.default.weight") == "adapter"
    assert part_name("language_model.model.layers.0.mlp.up_proj.weight") == "language_model"
    assert part_name("model.layers.0.mlp.up_proj.weight") == "language_model"  # the stage language
    assert part_name("lm_head.weight") == "language_model"
    assert part_name("vision_tower.embeddings.class_embedding") == "vision_tower"
    assert part_name("text_head.weight") == "text_head"


class Reader(torch.nn.Module):
    """Takes a batch and does nothing with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        pass


def test_pace_is_counts_over_the_time_of_training() -> None:
    now, drawn, waited = [100.0], [7], [3.0]
    model = Reader()
    meter = Meter(
        model,
        lambda: drawn[0],
        lambda: waited[0],
        lambda counts: 2 * counts,
        clock=lambda: now[0],
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    model(input_ids=torch.zeros(2, 4, dtype=torch.long), attention_mask=mask)
    model(input_ids=torch.zeros(1, 12, dtype=torch.long))
    drawn[0] += 3
    waited[0] += 0.5
    now[0] += 4
    meter.step_ended()
    now[0] += 30  # an evaluation, of which nothing counts
    with torch.no_grad():
        model(input_ids=torch.zeros(9, 9, dtype=torch.long))
    model.eval()
    model(input_ids=torch.zeros(9, 9, dtype=torch.long))
    model.train()
    meter.rested()
    now[0] += 1
    # Two ranks with the same counts: 2 x 3 records, 2 x (5 + 12) tokens of 2 x 20 positions.
    assert meter.numbers({}) == {
        "samples_per_second": 6 / 5,
        "tokens_per_second": 34 / 5,
        "padding_share": pytest.approx(1 - 34 / 40),
        "waiting_share": 0.5 / 5,
    }
    model(input_ids=torch.zeros(1, 6, dtype=torch.long))
    now[0] += 2
    assert meter.numbers({})["tokens_per_second"] == 2 * 6 / 2  # from the last log on
    meter.close()
    model(input_ids=torch.zeros(1, 6, dtype=torch.long))
    now[0] += 1
    assert meter.numbers({})["tokens_per_second"] == 0


def test_padding_is_what_a_padded_run_computes_in_vain(
    tmp_path: Path, recipe: Recipe, scenes: Scenes, llava: str
) -> None:
    data = scenes("instruct")
    lengths = [
        len(load_checkpoint(llava)[1].encode_ids(record.messages)[0])
        for record in read_records(data)
    ]
    values = {"stage": "instruct", "data": [data], "model": {"start": llava}, "log_steps": 1}
    found = {}
    for packing in (True, False):
        whole_batch = {"batch_size": len(lengths), "batches": {"packing": packing}}
        output = run(recipe(tmp_path / str(packing), **values | whole_batch))
        (found[packing],) = [
            row["padding_share"]
            for row in json.loads((output / "history.json").read_text())
            if "loss" in row
        ]
    assert found[True] == 0
    assert found[False] == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))
