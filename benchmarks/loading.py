"""Opening a folder: time and peak memory beside transformers, and what 4-bit weights save.

    python benchmarks/loading.py

A LLaVA folder of 196 million random float32 weights (786 MB) is written by transformers.
Each way of opening it runs in processes of its own, in turn. Time is from the imports' end
until model and processor are there and every weight has been read once; memory is the
process's peak above the peak of one that only imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

# The first two only import; the memory of the others is counted from them.
BASES = ("imports", "imports bitsandbytes")
WAYS = ("transformers", "vlm", "vlm 8bit", "vlm 4bit")
QUESTION = "what is in the picture?"


def write_folder(folder: Path) -> int:
    """A random LLaVA folder by transformers' own classes; returns the bytes of its weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    from vlm import testing

    testing.tiny_llava_folder(folder)  # for its tokenizer, template and preprocessing
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = CLIPVisionConfig(image_size=224, patch_size=16, intermediate_size=3072, **sizes)
    text = LlamaConfig(vocab_size=32_000, intermediate_size=2048, **sizes)
    Llava(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=4, image_seq_length=196
        )
    ).save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["patch_size"] = 16
    settings["image_processor"]["size"] = {"shortest_edge": 224}
    settings["image_processor"]["crop_size"] = {"height": 224, "width": 224}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return (folder / "model.safetensors").stat().st_size


def open_once(way: str, folder: str) -> dict[str, Any]:
    """Open the folder in this process and say what it took."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vlm import testing
    from vlm.checkpoint import load_checkpoint
    from vlm.messages import parse_messages, user

    if "bit" in way:
        import bitsandbytes  # noqa: F401

    size = 0
    started = time.perf_counter()
    if way == "transformers":
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        AutoProcessor.from_pretrained(folder)
        size = touch(model)
    elif way not in BASES:
        bits = way.removeprefix("vlm").strip() or None
        model, processor = load_checkpoint(folder, quantize=bits)  # type: ignore[arg-type]
        size = touch(model)
    seconds = time.perf_counter() - started
    peak = peak_memory()
    logits: list[float] = []
    if way.startswith("vlm"):
        chat = parse_messages([user(QUESTION, testing.draw_image((224, 224)))])
        row = processor.encode(chat, add_generation_prompt=True)
        with torch.inference_mode():
            output = model(**processor.collate([row], padding_side="left"), logits_to_keep=1)
        logits = output.logits.flatten().tolist()
    return {"seconds": seconds, "peak": peak, "size": size, "logits": logits}


def peak_memory() -> int:
    """The most resident bytes that this process has had (getrusage would count its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def touch(model: Any) -> int:
    """Read every weight once, as a mapped file costs nothing until then; returns their bytes."""
    size = 0
    for parameter in model.parameters():
        parameter.sum() if parameter.is_floating_point() else parameter.max()
        size += parameter.numel() * parameter.element_size()
    return size


def main() -> None:
    """Measure and print; with ``--way``, be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=BASES + WAYS)
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(open_once(options.way, options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(Path(folder))
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in BASES + WAYS}
        for _ in track(range(options.rounds), description="rounds"):
            for way in BASES + WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    Console().print(report(runs, size))


def report(runs: dict[str, list[dict[str, Any]]], size: int) -> Table:
    """Medians as ratios: time to transformers', memory to the file's size.

    The last column compares the next token's logits with those of the float32 weights.
    """

    def median(way: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[way])

    table = Table(title=f"opening {size / 1e6:.0f} MB of weights, median of {len(runs['vlm'])}")
    for column in (
        "way",
        "seconds",
        "time / transformers",
        "peak / file",
        "kept / file",
        "logits off by",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in WAYS:
        seconds = median(way, "seconds")
        peak = median(way, "peak") - median(BASES["bit" in way], "peak")
        logits, exact = (np.array(runs[name][0]["logits"]) for name in (way, "vlm"))
        table.add_row(
            way,
            f"{seconds:.2f}",
            f"{seconds / median('transformers', 'seconds'):.2f}",
            f"{peak / size:.2f}",
            f"{median(way, 'size') / size:.2f}",
            f"{np.linalg.norm(logits - exact) / np.linalg.norm(exact):.1%}" if len(logits) else "-",
        )
    return table


if __name__ == "__main__":
    main()
