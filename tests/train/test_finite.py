"""NaN and infinity end a run by name, and reach no checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoints import last_checkpoint, save_trained
from train.finite import check_finite
from train.run import run
from vlm.checkpoint import load_checkpoint, save_checkpoint
from vlm.errors import DivergenceError

ADAPTER = {"r": 2, "alpha": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory, llava: str) -> str:
    """A model that cannot read the letter Q: its embedding is infinite."""
    folder = tmp_path_factory.mktemp("overflowing")
    model, processor = load_checkpoint(llava)
    with torch.no_grad():
        letter = processor.tokenizer.convert_tokens_to_ids("Q")
        model.get_input_embeddings().weight[letter] = torch.inf
    save_checkpoint(model, processor, folder)
    return str(folder)


def dialogues(path: Path, *questions: str) -> str:
    lines = []
    for number, question in enumerate(questions):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"id": f"talk-{number}", "messages": turns}))
    path.write_text("\n".join(lines))
    return str(path)


def test_a_record_that_overflows_is_named_and_the_state_before_it_kept(
    overflowing: str, recipe: Callable[..., str], tmp_path: Path
) -> None:
    data = dialogues(tmp_path / "data.jsonl", "a?", "b?", "Q?", "c?", "d?", "e?")
    values = {"stage": "instruct", "model": {"start": overflowing}, "data": [data], "lora": ADAPTER}
    path = recipe(tmp_path / "out", **values, batch_size=1, save_steps=1, seed=3)
    with pytest.raises(DivergenceError, match=r"the loss is nan on the records talk-2;") as caught:
        run(path)
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert step > 1, "the seed must draw another record first"
    last = last_checkpoint(tmp_path / "out" / "checkpoints")
    assert last is not None and last.name == f"checkpoint-{step - 1}"
    assert all(t.isfinite().all() for t in load_file(last / "trained.safetensors").values())
    with pytest.raises(DivergenceError, match=f"step {step}: the loss is nan"):
        run(path)  # it goes on from there and meets the same record
    assert not (tmp_path / "out" / "vlm.json").exists()


def test_an_absurd_rate_ends_the_run_at_the_step_after(
    llava: str, recipe: Callable[..., str], tmp_path: Path
) -> None:
    data = dialogues(tmp_path / "data.jsonl", "a?", "b?", "c?", "d?")
    values = {"stage": "instruct", "model": {"start": llava}, "data": [data], "lora": ADAPTER}
    path = recipe(tmp_path / "out", **values, warmup_steps=0, learning_rate=1e30)
    with pytest.raises(DivergenceError, match="step 2: the loss is "):
        run(path)
    for path in (tmp_path / "out").rglob("*.safetensors"):  # of step 1: huge, but numbers
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    weights = {"fine": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(DivergenceError, match=r"1 trained parameters are no longer finite \(bad,"):
        save_trained(weights, tmp_path / "checkpoint-1")
    assert not list(tmp_path.iterdir())


def test_what_is_told_of_a_step() -> None:
    fine, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    names = [("a", "b"), ("c",), ("d",)]
    check_finite(1, [fine, fine, fine], torch.tensor(2.0), names)
    check_finite(1, [fine, fine, fine], None, names)
    with pytest.raises(DivergenceError, match="step 7: the loss is inf on the records c;"):
        check_finite(7, [fine, bad, fine], bad, names)
    with pytest.raises(DivergenceError, match="gradient norm is inf on the records a, b, c, d;"):
        check_finite(7, [fine, fine, fine], bad, names)
    with pytest.raises(DivergenceError, match="records 0, 1, 2, 3, 4, 5, 6, 7 and 2 more;"):
        check_finite(1, [bad], None, [tuple(map(str, range(10)))])
