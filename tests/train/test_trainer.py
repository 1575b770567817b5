"""The loop: the loss and the update of a global batch, and what a checkpoint holds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from train.collate import DialogueCollator, TextCollator
from train.config import RunConfig
from train.stages import STAGES, apply_stage
from train.trainer import StageTrainer
from vlm.checkpoint import load_checkpoint
from vlm.errors import CheckpointError
from vlm.messages import Record, assistant, user
from vlm.testing import draw_image


@dataclass
class Step:
    """One optimiser step: its loss, and the gradient of every trained parameter."""

    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Four answers of very different lengths, one of them without a picture."""
    folder = tmp_path_factory.mktemp("records")
    made = []
    for index, answer in enumerate(("a", "red " * 40, "two fish", "left of it")):
        path = str(folder / f"{index}.png")
        draw_image(seed=index).save(path)
        images = () if index == 2 else (path,)
        made.append(Record(str(index), images, (user("what?", *images), assistant(answer))))
    return made


def config_of(path: Path, stage: str, **values: Any) -> RunConfig:
    model = {"start": "x"} if stage == "instruct" else {"language": "x"}
    defaults = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "log_steps": 1}
    fixed = {"stage": stage, "output": str(path), "data": ["x"], "model": model}
    return RunConfig.model_validate(fixed | defaults | {"max_grad_norm": 1e9} | values)


def one_step(config: RunConfig, llava: str, records: list[Record]) -> Step:
    """Train one step from the folder's weights; AdamW's first moment holds a tenth of g."""
    model, processor = load_checkpoint(llava)
    collate: Any = DialogueCollator(processor)
    trained: torch.nn.Module = model
    if config.stage == "language":
        trained = model.language_model
        collate = TextCollator(processor.tokenizer, processor.context_length)
    apply_stage(trained, STAGES[config.stage], None)
    trainer = StageTrainer(
        run_config=config, model=trained, data_collator=collate, train_dataset=records
    )
    trainer.train_from(None)
    assert trainer.optimizer is not None
    state = trainer.optimizer.state
    gradients = {n: state[p]["exp_avg"] / 0.1 for n, p in trained.named_parameters() if p in state}
    return Step(trainer.state.log_history[0]["loss"], gradients)


def by_hand(llava: str, records: list[Record]) -> tuple[float, dict[str, Tensor]]:
    """Row by row: the sum of the surprise over all answers by the number of their tokens."""
    model, processor = load_checkpoint(llava)
    total, count = torch.tensor(0.0), 0
    for record in records:
        row = processor.encode(record.messages)
        batch = processor.collate([row])
        places = [t for t, learnt in enumerate(row.loss_mask) if learnt]
        logits = model(**batch).logits[0, [t - 1 for t in places]]
        wanted = torch.tensor([row.input_ids[t] for t in places])
        total = total - F.log_softmax(logits, -1)[range(len(places)), wanted].sum()
        count += len(places)
    (total / count).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach() / count), gradients


@pytest.mark.parametrize("stage", ["instruct", "language"])
def test_any_split_of_the_global_batch_gives_the_same_step(
    llava: str, records: list[Record], tmp_path: Path, stage: str
) -> None:
    if stage == "language":
        records = [Record(r.id, (), (user("what?"), r.messages[1])) for r in records]
    loss, gradients = by_hand(llava, records)
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = config_of(
            tmp_path / str(batch), stage, batch_size=batch, gradient_accumulation=accumulation
        )
        step = one_step(config, llava, records)
        assert abs(step.loss - loss) < 1e-5 * loss
        prefix = "language_model." if stage == "language" else ""
        assert len(step.gradients) >= 21
        for name, gradient in step.gradients.items():
            expected = gradients[prefix + name]
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9, name


def test_a_checkpoint_holds_what_is_trained_and_fits_nothing_else(
    llava: str, records: list[Record], tmp_path: Path
) -> None:
    one_step(config_of(tmp_path, "instruct", batch_size=4), llava, records)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    model, processor = load_checkpoint(llava)
    frozen = {f"vision_tower.{n}" for n, _ in model.vision_tower.named_parameters()}
    saved = load_file(checkpoint / "trained.safetensors")
    assert saved.keys() == {n for n, _ in model.named_parameters()} - frozen
    apply_stage(model, STAGES["align"], None)
    other = StageTrainer(
        run_config=config_of(tmp_path, "instruct", batch_size=4, epochs=2),
        model=model,
        data_collator=DialogueCollator(processor),
        train_dataset=records,
    )
    with pytest.raises(CheckpointError, match="other parameters than this run trains"):
        other.train_from(checkpoint)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_held_out_loss_is_a_mean_over_tokens(
    llava: str, records: list[Record], tmp_path: Path, size: int
) -> None:
    """A short answer alone in a batch counts for no more than beside a long one."""
    model, processor = load_checkpoint(llava)
    config = config_of(tmp_path, "instruct", batch_size=size, eval_data="x")
    trainer = StageTrainer(
        run_config=config,
        model=model,
        data_collator=DialogueCollator(processor),
        train_dataset=records,
        eval_dataset=records,
    )
    expected, _ = by_hand(llava, records)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
