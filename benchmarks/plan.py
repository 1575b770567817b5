"""`vlm plan`'s memory beside the growth of the peak of a real step, float32 on a CPU.

    python benchmarks/plan.py                  # tiny; --scale mid for 220 million weights

Each case is a process of its own with one thread: random weights, 4 rows of 512 tokens of which
64 are learnt, one AdamW step after one that makes the optimiser's states. Growth is over the
peak of two steps of a very small model; malloc gives back at once what is freed. The tower does
not run: a step's peak is the decoder's.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
from shapes import SHAPES
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from train.attention import Tree, packed_rows
from train.outline import meta_model
from train.plan_memory import Load, memory_of
from train.settings import RunConfig
from train.stages import STAGES, apply_stage
from train.trial import enable_packing
from vlm import testing
from vlm.model import VisionLanguageModel

LORA = {"r": 16, "alpha": 32, "dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "align": {"stage": "align"},
    "align, checkpointing": {"stage": "align", "gradient_checkpointing": True},
    "lora": {"lora": LORA},
    "lora, checkpointing": {"lora": LORA, "gradient_checkpointing": True},
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
}
ROWS, TOKENS, LEARNT = 4, 512, 64
# Memory that is freed goes back to the system at once, so that none of it counts as used.
RETURNING = os.environ | {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}


def config_of(case: str) -> RunConfig:
    """The run of a case."""
    values = {"stage": "instruct", **CASES[case]}
    parts = {"start": "-"} if values["stage"] == "instruct" else {"vision": "-", "language": "-"}
    fixed = {"output": "-", "data": ["-"], "model": parts, "learning_rate": 1e-4}
    return RunConfig.model_validate({**fixed, "batch_size": ROWS, **values})


def least() -> LlavaConfig:
    """The config of a model of next to no weights."""
    vision, text = testing.tiny_vision_config(), testing.tiny_text_config()
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)


def llava(scale: str) -> LlavaConfig:
    """The config of a scale; see `shapes`."""
    vision, text, _ = SHAPES[scale]
    wide = CLIPVisionConfig(**vision, image_size=224, intermediate_size=4 * vision["hidden_size"])
    decoder = LlamaConfig(**text, intermediate_size=8 * text["hidden_size"] // 3)
    return LlavaConfig(vision_config=wide, text_config=decoder, image_token_index=5)


def peak() -> int:
    """Bytes of the process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(scale: str, case: str) -> None:
    """Print predicted and measured bytes of one case, in this process."""
    torch.set_num_threads(1)
    config, found = config_of(case), llava(scale)
    planned, _ = meta_model(config, found)
    parts = memory_of(config, planned, Load(TOKENS, LEARNT, 0), ROWS, 1)
    steps(config, least(), LEARNT)  # what is imported and set up once is no part of the plan
    before = peak()
    steps(config, found, TOKENS)
    predicted = sum(size for name, size in parts.items() if name != "context")
    print(json.dumps([predicted / 1e6, (peak() - before) / 1e6]))


def steps(config: RunConfig, found: LlavaConfig, tokens: int) -> None:
    """Two optimiser steps of a new model."""
    model = VisionLanguageModel(found)
    apply_stage(model, STAGES[config.stage], config.lora)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    assert enable_packing(model.language_model) is None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    rows = ROWS * tokens
    labels = torch.full((1, rows), -100)
    labels.view(ROWS, tokens)[:, -LEARNT:] = 7
    trees = [Tree(i * tokens, tokens) for i in range(ROWS)]
    places = torch.arange(tokens).repeat(ROWS)[None]
    for _ in range(2):
        width = found.text_config.hidden_size
        states = torch.randn(1, rows, found.vision_config.hidden_size)
        visual = model.multi_modal_projector(states)
        embeds = model.get_input_embeddings()(torch.randint(6, 200, (1, rows))) + visual
        assert embeds.shape == (1, rows, width)
        with packed_rows(trees, labels):
            model(inputs_embeds=embeds, position_ids=places, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """A line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=SHAPES, default="tiny")
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case is not None:
        measure(options.scale, options.case)
        return
    for case in CASES:
        words = [sys.executable, __file__, "--scale", options.scale, "--case", case]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=RETURNING)
        predicted, measured = json.loads(done.stdout.splitlines()[-1])
        ratio = predicted / measured
        print(f"{case:22} {predicted:8.0f} MB planned {measured:8.0f} measured  x {ratio:.2f}")


if __name__ == "__main__":
    main()
