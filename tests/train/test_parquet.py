"""Training reads Parquet with the pictures inside as it reads JSONL beside its pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_recipes.formats import write_parquet
from train.config import load_config
from train.run import run
from vlm.messages import read_records


def losses(path: str) -> list[Any]:
    run(path)
    history = json.loads((Path(load_config(path).output) / "history.json").read_text())
    return [row["loss"] for row in history if "loss" in row]


def test_the_same_losses(
    tmp_path: Path, recipe: Callable[..., str], scenes: Callable[..., str], llava: str
) -> None:
    data = scenes("instruct")
    write_parquet(read_records(data), tmp_path)
    found = [
        losses(
            recipe(
                tmp_path / name,
                stage="instruct",
                data=[source],
                model={"start": llava},
                batch_size=4,
                epochs=1,
                log_steps=1,
            )
        )
        for name, source in (("jsonl", data), ("parquet", str(tmp_path / "records.parquet")))
    ]
    assert found[0] and found[0] == found[1]
