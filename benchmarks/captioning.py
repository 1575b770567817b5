"""Captions of many files: this package beside transformers' generate, tokens compared.

    python benchmarks/captioning.py
    python benchmarks/captioning.py --scale mid --pictures 32

Same random weights, greedy, float32, one process, the ways in turn. Every way reads the same
JPEG files and makes its own pixels. Answers have given lengths of 8 to 64 tokens: a token
that is never the likeliest ends them. ``generate`` runs in padded batches of 16 and one
picture a call; here up to 32 run together and a finished row makes room for the next.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes import STOP_ID, write_llava
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
)

from vlm import testing
from vlm.assistant import Assistant, load
from vlm.engine.sampling import Sampling

QUESTION = "describe."
Tokens = list[list[int]]


class EndAt(LogitsProcessor):
    """Ends each row of a padded batch at its own length."""

    def __init__(self, lengths: list[int], prompt: int) -> None:
        self.lengths, self.prompt = torch.tensor(lengths), prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the stop token alone to rows that are long enough."""
        over = self.lengths <= input_ids.shape[1] - self.prompt
        scores[over] = -torch.inf
        scores[over, STOP_ID] = 0
        return scores


def by_generate(
    model: Any, processor: Any, files: list[Path], lengths: list[int], size: int
) -> Tokens:
    """Padded batches of `size`."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    answers: Tokens = []
    for start in range(0, len(files), size):
        pictures = [Image.open(path).convert("RGB") for path in files[start : start + size]]
        batch = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
        width = batch["input_ids"].shape[1]
        wanted = lengths[start : start + size]
        with torch.inference_mode():
            found = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max(wanted) + 1,
                logits_processor=LogitsProcessorList([EndAt(wanted, width)]),
                eos_token_id=STOP_ID,
                pad_token_id=0,
            )
        answers += [row[:n] for row, n in zip(found[:, width:].tolist(), wanted, strict=True)]
    return answers


def by_vlm(assistant: Assistant, files: list[Path], lengths: list[int]) -> Tokens:
    """Files read ahead in threads while one continuous batch runs."""
    assistant.engine.cache.clear()
    assistant.engine.prefixes.clear()
    with ThreadPoolExecutor(2) as pool:
        ready = pool.map(lambda path: assistant.prepare_ahead(path, QUESTION), files)
        requests = (
            replace(request, sampling=Sampling(max_new_tokens=length, stop_loops=False))
            for request, length in zip(ready, lengths, strict=True)
        )
        return [list(answer.ids) for answer in assistant.engine.generate_all(requests)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action="store_true", help="also in bfloat16: other tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [random.Random(i).randint(8, 64) for i in range(options.pictures)]
    with tempfile.TemporaryDirectory() as name:
        folder = write_llava(Path(name) / "model", options.scale)
        files = [Path(name) / f"{i}.jpg" for i in range(options.pictures)]
        for i, path in enumerate(files):
            testing.draw_image((640, 480), seed=i).save(path, quality=90)
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        assistant = load(folder)
        assistant.processor.eos_token_ids = frozenset({STOP_ID})
        started = time.perf_counter()
        assistant.engine.optimize()
        packing = time.perf_counter() - started
        ways: dict[str, Callable[[], Tokens]] = {
            "vlm": lambda: by_vlm(assistant, files, lengths),
            "generate, batches of 16": lambda: by_generate(model, processor, files, lengths, 16),
            "generate, one a call": lambda: by_generate(model, processor, files, lengths, 1),
        }
        if options.bfloat16:
            half = load(folder, dtype="bfloat16")
            half.processor.eos_token_ids = frozenset({STOP_ID})
            ways["vlm, bfloat16"] = lambda: by_vlm(half, files, lengths)
        times, answers = measure(ways, options.rounds)
    distinct = len({token for answer in answers["vlm"] for token in answer})
    title = f"{options.scale}, {options.pictures} files, {options.threads} threads, "
    title += f"{distinct} different tokens, packing once {packing:.2f} s"
    Console().print(report(title, times, answers))


def measure(
    ways: dict[str, Callable[[], Tokens]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Tokens]]:
    """Each way once a round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, Tokens] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            answers[name] = way()
            if number:
                times[name].append(time.perf_counter() - started)
    return times, answers


def report(title: str, times: dict[str, list[float]], answers: dict[str, Tokens]) -> Table:
    """Medians, as times those of this package, and how many answers are the same tokens."""
    table = Table(title=title)
    for column in ("way", "ms a file", "times vlm's", "same answers"):
        table.add_column(column, justify="left" if column == "way" else "right")
    ours = statistics.median(times["vlm"])
    for name, taken in times.items():
        same = sum(a == b for a, b in zip(answers[name], answers["vlm"], strict=True))
        middle = statistics.median(taken)
        table.add_row(
            name,
            f"{1000 * middle / len(answers[name]):.1f}",
            f"{middle / ours:.2f}",
            f"{same} of {len(answers[name])}",
        )
    return table


if __name__ == "__main__":
    main()
