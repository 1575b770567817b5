"""Any split of the global batch gives the same run, and its loss is the peer's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from train.collate import DialogueCollator
from train.run import run
from vlm.checkpoint import load_checkpoint
from vlm.messages import read_records
from vlm.testing import draw_image

SPLITS = ((8, 1), (4, 2), (1, 8))
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_records: Callable[..., str]) -> str:
    """24 records, every third without a picture, with answers of 1 to 40 letters."""
    folder = tmp_path_factory.mktemp("splits")
    rows = []
    for number in range(24):
        images = [f"{number}.png"] if number % 3 else []
        if images:
            draw_image(seed=number).save(folder / images[0])
        rows.append((images, f"{number}?", "x" * (1 + number * 7 % 40)))
    return write_records(folder, rows)


def trained(folder: Path, recipe: Callable[..., str], llava: str, data: str, **values: Any) -> Path:
    fixed = {"stage": "instruct", "data": [data], "model": {"start": llava}, "log_steps": 1}
    rates = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": STEPS}
    return run(recipe(folder, **fixed | rates | values))


def rows(folder: Path, key: str) -> list[float]:
    return [row[key] for row in json.loads((folder / "history.json").read_text()) if key in row]


@pytest.mark.parametrize("packing", [True, False])
def test_any_split_gives_the_same_losses_and_weights(
    packing: bool, tmp_path: Path, recipe: Callable[..., str], llava: str, data: str
) -> None:
    folders = [
        trained(
            tmp_path / f"{size}x{parts}",
            recipe,
            llava,
            data,
            batch_size=size,
            gradient_accumulation=parts,
            batches={"packing": packing},
        )
        for size, parts in SPLITS
    ]
    first, *others = folders
    start, reference = (load_checkpoint(f)[0].state_dict() for f in (llava, first))
    moved = [name for name in start if not torch.equal(start[name], reference[name])]
    assert len(moved) > 20
    for folder in others:
        for key in ("loss", "grad_norm"):
            assert len(rows(folder, key)) == STEPS
            assert rows(folder, key) == pytest.approx(rows(first, key), rel=1e-5)
        weights = load_checkpoint(folder)[0].state_dict()
        for name, expected in reference.items():
            off = (weights[name] - expected).norm() / expected.norm().clamp(min=1e-3)
            assert off <= 1e-5, name


def test_the_first_loss_is_that_of_transformers(
    tmp_path: Path, recipe: Callable[..., str], llava: str, data: str
) -> None:
    records = list(read_records(data))
    folder = trained(
        tmp_path / "out", recipe, llava, data, batch_size=len(records), max_steps=1, epochs=1
    )
    processor = load_checkpoint(llava)[1]
    peer = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    batch = DialogueCollator(processor)(records)
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = peer(**batch, labels=labels).loss.item()
    assert rows(folder, "loss") == pytest.approx([expected], rel=1e-5)
