"""One process against two with each way of sharding: losses, weights and files.

    python benchmarks/sharding.py

Runs on CPUs (gloo), with a tiny model of random weights. DeepSpeed's two ways are tried where
it is installed (`pip install 'vlm[deepspeed]'`).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from data_recipes.scenes import build
from vlm.checkpoint import load_checkpoint
from vlm.testing import tiny_llava_folder

LAUNCH = Path(__file__).parents[1] / "train" / "launch"
WAYS = {"none": "ddp", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
VLM = str(Path(sys.executable).with_name("vlm"))
ACCELERATE = str(Path(sys.executable).with_name("accelerate"))


def main() -> None:
    """Print a line for each way."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        alone = train(root, "alone", "none", 1)
        print(f"{'sharding':>8}  {'|loss - 1|':>10}  {'weights':>9}  files of one process")
        for sharding in WAYS:
            if sharding.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
                print(f"{sharding:>8}  not tried: pip install 'vlm[deepspeed]'")
                continue
            compare(sharding, alone, train(root, sharding, sharding, 2))


def train(root: Path, name: str, sharding: str, processes: int) -> Path:
    """Train three steps of four records and return the folder."""
    if not (root / "llava").exists():
        tiny_llava_folder(root / "llava")
        build(12, 0, root / "data", task="instruct", turns=2, max_objects=2, side=32)
    recipe = {
        "stage": "instruct",
        "output": str(root / name),
        "data": [str(root / "data" / "records.jsonl")],
        "model": {"start": str(root / "llava")},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "batch_size": 4 // processes,
        "log_steps": 1,
        "watch": {"samples": 0, "probes": 0},
        "sharding": sharding,
    }
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [VLM, "train", str(path)]
    if processes > 1:
        file = LAUNCH / f"{WAYS[sharding]}.yaml"
        launch = [ACCELERATE, "launch", "--config_file", str(file), "--num_processes", "2"]
        command = [*launch, "--no_python", *command]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return root / name


def compare(sharding: str, alone: Path, both: Path) -> None:
    """Print the greatest relative differences."""
    one, two = (
        [row["loss"] for row in json.loads((f / "history.json").read_text()) if "loss" in row]
        for f in (alone, both)
    )
    loss = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    first, second = (load_checkpoint(folder)[0].state_dict() for folder in (alone, both))
    weights = max(
        float((second[key] - tensor).norm() / tensor.norm().clamp(min=1e-3))
        for key, tensor in first.items()
    )
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (alone, both)]
    same = "the same" if names[0] == names[1] else f"differ: {sorted(names[0] ^ names[1])}"
    print(f"{sharding:>8}  {loss:10.1e}  {weights:9.1e}  {same}")


if __name__ == "__main__":
    main()
