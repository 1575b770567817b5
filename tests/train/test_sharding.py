"""Two ranks that hold a slice each train as one process that holds all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import TrainingArguments

import train.sharding
import train.trainer
from train.config import load_config
from train.run import run
from train.sharding import check_sharded, check_sharding, deepspeed_config
from vlm.checkpoint import load_checkpoint
from vlm.errors import ConfigError, MissingExtraError
from vlm.testing import draw_image

LAUNCH = Path(train.sharding.__file__).with_name("launch")
NUM_RECORDS, BAD = 12, 5
LORA = {"r": 3, "alpha": 6, "dropout": 0.0}  # three rows between two ranks: slices of 2 and 1

# Rank 0 is told to stop in its second step; both go on from the checkpoint.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import train.run

rank = int(os.environ["RANK"])
waiting = []
told = []

class Watched(train.run.StageTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 0:
            shapes = {}
            for name, p in self.model.named_parameters():
                assert type(p.data).__name__ == "DTensor", name
                shapes[name] = [list(p.shape), list(p.to_local().shape)]
            told.append([type(self.model_wrapped).__name__, self.args.world_size, shapes])
        while waiting and self.state.global_step == 1:
            signal.raise_signal(waiting.pop())
        return super().training_step(*args, **kwargs)

train.run.StageTrainer = Watched
for recipe in sys.argv[1:]:
    waiting += [signal.SIGTERM] if rank == 0 else []
    try:
        train.run.run(recipe)
    except train.run.Interrupted as stopped:
        told.append(str(stopped))
        assert stopped.exit_code == 0
        if rank == 0:
            last = Path(recipe).with_suffix("") / "checkpoints" / "checkpoint-2"
            shutil.copytree(last, Path(recipe).parent / "kept", dirs_exist_ok=True)
        train.run.run(recipe)
Path(sys.argv[1]).with_name(f"rank{rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_records: Callable[..., str]) -> str:
    """One picture, and one that is missing: most batches have none, one has no record."""
    folder = tmp_path_factory.mktemp("sharded")
    draw_image().save(folder / "0.png")
    shown = (([f"{n}.png"] if n in (0, BAD) else []) for n in range(NUM_RECORDS))
    rows = [(own, f"{n}?", "x" * (1 + n * 7 % 40)) for n, own in enumerate(shown)]
    return write_records(folder, rows)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., str], data: str, llava: str
) -> Path:
    """A folder with the same trainings by one process and by two with slices."""
    folder = tmp_path_factory.mktemp("results")
    values = {"stage": "instruct", "data": [data], "model": {"start": llava}, "log_steps": 1}
    values |= {"learning_rate": 1e-3, "warmup_steps": 0, "save_steps": 1}
    sharded = {"batch_size": 1, "gradient_accumulation": 2, "sharding": "fsdp2"}
    paths = []
    for name, lora in (("full", None), ("lora", LORA)):
        run(recipe(folder / f"{name}-alone", batch_size=4, lora=lora, **values))
        paths.append(recipe(folder / f"{name}-both", lora=lora, **values | sharded))
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(folder / "script.py"), *paths]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as started:
        try:
            _, told = started.communicate(timeout=180)
        finally:
            started.terminate()  # it ends its ranks, which a kill would leave behind
    assert started.returncode == 0, told[-3000:]
    return folder


def test_each_rank_held_a_slice_of_everything(results: Path) -> None:
    ranks = [json.loads((results / f"rank{rank}.json").read_text()) for rank in range(2)]
    for told in ranks:
        assert [each[:2] for each in told if isinstance(each, list)] == [
            ["FSDPVisionLanguageModel", 2]
        ] * 4  # two micro-batches of the first step of two runs
        stops = [each for each in told if isinstance(each, str)]
        assert len(stops) == 2 and all(each.startswith("stopped at step 2 of 3") for each in stops)
    first, second = (told[-2][2] for told in ranks)  # of the second run, which has an adapter
    for name, (whole, part) in first.items():
        assert part[0] + second[name][1][0] == whole[0] and part[1:] == whole[1:], name
    query = "language_model.model.layers.0.self_attn.q_proj."
    assert first[query + "base_layer.weight"] == [[32, 32], [16, 32]]
    assert second[query + "lora_A.default.weight"] == [[3, 32], [1, 32]]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_slices_learn_what_the_whole_does(results: Path, llava: str, name: str) -> None:
    folders = (results / f"{name}-alone", results / f"{name}-both")
    start, alone, both = (load_checkpoint(f)[0].state_dict() for f in (llava, *folders))
    moved = [key for key in start if not torch.equal(start[key], alone[key])]
    assert len(moved) >= 18
    for key, expected in alone.items():
        off = (both[key] - expected).norm() / expected.norm().clamp(min=1e-3)
        assert off <= 1e-5, key
    histories = [json.loads((folder / "history.json").read_text()) for folder in folders]
    for key in ("loss", "grad_norm"):
        one, two = ([row[key] for row in rows if key in row] for rows in histories)
        assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)
    bad = [(folder / "quarantine.jsonl").read_text() for folder in folders]
    assert bad[0] == bad[1] and json.loads(bad[0])["id"] == str(BAD)


def test_what_slices_write_is_whole(results: Path) -> None:
    for name in ("lora", "full"):
        alone, both = (
            {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
            for folder in (results / f"{name}-alone", results / f"{name}-both")
        )
        # Sample answers come from the live model, which no rank has whole.
        assert alone.keys() ^ both.keys() <= {"samples.jsonl"} and "vlm.json" in both
        for path in (each for each in both if each.endswith(".safetensors")):
            one, two = load_file(alone[path]), load_file(both[path])
            assert {k: t.shape for k, t in one.items()} == {k: t.shape for k, t in two.items()}
    # A checkpoint, too, is what a run without slices would have written.
    kept = results / "kept"
    tensors = load_file(kept / "trained.safetensors")
    assert {t.shape for n, t in tensors.items() if "q_proj.lora_A" in n} == {torch.Size([3, 32])}
    state = torch.load(kept / "optimizer.pt", weights_only=True)["state"]
    shapes = sorted(tuple(entry["exp_avg"].shape) for entry in state.values())
    assert shapes == sorted(tuple(tensor.shape) for tensor in tensors.values())


def config_of(recipe: Callable[..., str], folder: Path, **values: Any) -> Any:
    fixed = {"stage": "instruct", "data": ["x"], "model": {"start": "x"}}
    return load_config(recipe(folder / "out", **fixed | values))


def test_what_cannot_be_sharded_is_told_at_once(
    recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**values: Any) -> str:
        with pytest.raises((ConfigError, MissingExtraError)) as caught:
            check_sharding(config_of(recipe, tmp_path, **values))
        return str(caught.value)

    check_sharding(config_of(recipe, tmp_path))
    for sharding in ("fsdp2", "zero2", "zero3"):
        assert "needs several processes and there is one" in refused(sharding=sharding)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_sharding(config_of(recipe, tmp_path, sharding="fsdp2"))
    assert "muon" in refused(sharding="fsdp2", optimizer="muon")
    assert "feature_cache" in refused(sharding="fsdp2", batches={"feature_cache": "x"})
    few_bits = {"model": {"start": "x", "quantize": "4bit"}, "lora": {"r": 2}}
    assert "quantize" in refused(sharding="fsdp2", **few_bits)
    monkeypatch.setattr(train.sharding.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'vlm[deepspeed]'" in refused(sharding="zero2")


def test_a_model_that_was_not_sharded_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight is not spread over 2 processes"):
        check_sharded(torch.nn.Linear(2, 2), 2)


def test_ranks_that_do_not_find_each_other_are_refused(
    recipe: Callable[..., str],
    scenes: Callable[..., str],
    llava: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    # As where two processes were started but the backend found no way between them.
    monkeypatch.setattr(train.trainer, "ranks_of_environment", lambda: (0, 2))
    with pytest.raises(ConfigError, match="2 processes were started, but each would train with 1"):
        run(recipe(tmp_path / "out", **values))


def test_one_process_does_not_split_its_batches_over_gpus(
    recipe: Callable[..., str],
    scenes: Callable[..., str],
    llava: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"stage": "instruct", "data": [scenes("instruct")], "model": {"start": llava}}
    monkeypatch.setattr(TrainingArguments, "n_gpu", 8)
    with pytest.raises(ConfigError, match="one process sees 8 GPUs; start one for each"):
        run(recipe(tmp_path / "out", **values))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_launcher_and_the_recipe_must_agree(
    name: str, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LAUNCH / f"{name}.yaml"
    environment = launched_environment(file) | {"RANK": "0", "WORLD_SIZE": "2"}
    monkeypatch.setattr(train.sharding.importlib.util, "find_spec", lambda name: object())
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    sharding = "none" if name == "ddp" else name
    check_sharding(config_of(recipe, tmp_path, sharding=sharding))
    told = [key for key in os.environ if "FSDP" in key.split("_") or "DEEPSPEED" in key]
    assert not [key for key in told if key.startswith("ACCELERATE")]  # or it would shard again
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if name != "ddp":
        with pytest.raises(ConfigError, match=f"the launcher was told {name}, the recipe says"):
            check_sharding(config_of(recipe, tmp_path))


def launched_environment(file: Path) -> dict[str, str]:
    """What accelerate's own launcher tells its processes of a config file."""
    words = ["--config_file", str(file), "--num_processes", "2", "script.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # as `accelerate launch` joins them
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if key not in os.environ}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gets_its_own_file(
    stage: int, recipe: Callable[..., str], tmp_path: Path
) -> None:
    settings = deepspeed_config(config_of(recipe, tmp_path, sharding=f"zero{stage}"))
    assert settings is not None and settings["zero_optimization"]["stage"] == stage
    # The recipe says these; a number here would overrule it in silence.
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size"):
        assert settings[key] == "auto"
    assert settings["train_micro_batch_size_per_gpu"] == "auto" == settings["bf16"]["enabled"]
    assert deepspeed_config(config_of(recipe, tmp_path)) is None
