"""Five turns on one picture: this package beside transformers, stateless and with a kept cache.

    python benchmarks/chatting.py
    python benchmarks/chatting.py --scale mid --rounds 1

Same random weights, greedy, float32, one process, the ways in turn, tokens compared. Time to
first token (TTFT) counts everything after the question is known: prompt, picture (turn 1),
prefill. `--processor-time` counts the process's own time (all threads), for a machine that does
other work too. The second peer is what a user can write by hand: one `DynamicCache` for the whole
conversation, given to every `generate`, and only new tokens as input.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import STOP_ID, write_llava
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from vlm import testing
from vlm.assistant import load
from vlm.engine.request import Request
from vlm.engine.sampling import Sampling

QUESTIONS = ["what is it?", "is that all of it?", "which colour is it?", "and why?", "thanks."]
NEW_TOKENS = 24
Turns = list[tuple[float, float, list[int]]]  # seconds to the first token, to the last; tokens


clock: Callable[[], float] = time.perf_counter


class Clock(BaseStreamer):
    """Notes when the first new token of a `generate` call came."""

    def __init__(self) -> None:
        self.calls, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        """The prompt comes first, then each token."""
        self.calls += 1
        if self.calls == 2:
            self.first = clock()

    def end(self) -> None:
        """Nothing to do."""


def by_generate(
    model: Any, processor: Any, prompts: list[list[int]], picture: Any, kept: bool
) -> Turns:
    """Each turn one `generate` call on all ids so far, with or without a kept cache."""
    turns: Turns = []
    cache = DynamicCache(config=model.config.get_text_config()) if kept else None
    ids: list[int] = []
    for number, prompt in enumerate(prompts):
        started = clock()
        ids = ids + prompt
        streamer, options = Clock(), {}
        if number == 0 or not kept:
            pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
            options["pixel_values"] = pixels
        if kept:
            options["past_key_values"] = cache
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            found = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=STOP_ID,
                pad_token_id=0,
                streamer=streamer,
                **options,
            )
        answer = found[0, len(ids) :].tolist()
        turns.append((streamer.first - started, clock() - started, answer))
        ids = ids + answer
    return turns


def by_vlm(assistant: Any, prompts: list[list[int]], picture: Any) -> Turns:
    """Each turn one streamed request that leaves its keys and values to the next."""
    from vlm.images import load_image
    from vlm.processor import Encoded

    assistant.engine.cache.clear()
    assistant.engine.prefixes.clear()
    turns: Turns = []
    ids: list[int] = []
    image = load_image(picture)
    for prompt in prompts:
        started = clock()
        ids = ids + prompt
        encoded = Encoded(ids, [False] * len(ids), [image])
        sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_loops=False)
        first = 0.0
        for row in assistant.engine.stream(Request(encoded, sampling, keep=True)):  # noqa: B007
            first = first or clock()
        turns.append((first - started, clock() - started, list(row.ids)))
        ids = ids + list(row.ids)
    return turns


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("tiny", "mid"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    if options.processor_time:
        global clock
        clock = time.process_time
    torch.set_num_threads(options.threads)
    picture = testing.draw_image((640, 480), seed=1)
    patch = {"tiny": 28, "mid": 14}[options.scale]  # 64 and 256 visual tokens of 224 pixels
    image_size = {"tiny": 224, "mid": 336}[options.scale]  # 336: 576 visual tokens
    with tempfile.TemporaryDirectory() as name:
        folder = write_llava(Path(name), options.scale, patch, image_size)
        model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        assistant = load(folder)
        assistant.processor.eos_token_ids = frozenset({STOP_ID})
        assistant.engine.optimize()
        prompts = turns_of(processor, assistant.processor.num_visual_tokens)
        ways: dict[str, Callable[[], Turns]] = {
            "vlm": lambda: by_vlm(assistant, prompts, picture),
            "generate, stateless": lambda: by_generate(model, processor, prompts, picture, False),
            "generate, kept cache": lambda: by_generate(model, processor, prompts, picture, True),
        }
        runs: dict[str, list[Turns]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                turns = way()
                if number:
                    runs[name].append(turns)
    visual = (image_size // patch) ** 2
    Console().print(
        report(
            f"{options.scale}, {visual} visual tokens, {options.threads} threads"
            + (", processor time" if options.processor_time else ""),
            runs,
        )
    )


def turns_of(processor: Any, visual: int) -> list[list[int]]:
    """Ids that each turn adds: the end of the last answer, the question, the answer's opening."""
    tokenizer = processor.tokenizer
    first, *others = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (
            f"<|user|><image>{QUESTIONS[0]}<|end|><|assistant|>",
            *(f"<|end|><|user|>{text}<|end|><|assistant|>" for text in QUESTIONS[1:]),
        )
    )
    place = first.index(tokenizer.convert_tokens_to_ids("<image>"))
    return [first[:place] + [first[place]] * visual + first[place + 1 :], *others]


def report(title: str, runs: dict[str, list[Turns]]) -> Table:
    """Medians: seconds to the first token turn by turn, and the peers as times of ours."""
    table = Table(title=title)
    for column in (
        "way",
        "TTFT ms, turns 1-5",
        "turns 2-5 / vlm's",
        "session / vlm's",
        "same tokens",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")

    def first(name: str) -> list[float]:
        return [statistics.median(run[turn][0] for run in runs[name]) for turn in range(5)]

    def session(name: str) -> float:
        return statistics.median(sum(turn[1] for turn in run) for run in runs[name])

    ours = first("vlm")
    for name, taken in runs.items():
        seconds = first(name)
        later = [a / b for a, b in zip(seconds[1:], ours[1:], strict=True)]
        same = all(a[2] == b[2] for a, b in zip(taken[0], runs["vlm"][0], strict=True))
        table.add_row(
            name,
            " ".join(f"{1000 * s:.0f}" for s in seconds),
            f"{min(later):.1f} to {max(later):.1f}",
            f"{session(name) / session('vlm'):.2f}",
            "yes" if same else "no",
        )
    return table


if __name__ == "__main__":
    main()
