"""Decode steps, compiled and not, beside transformers' generate and the memory's bound.

    python benchmarks/decoding.py --rows 1 8
    python benchmarks/decoding.py --scale 7b --device cuda --dtype bfloat16 --rows 1 16

Same random weights, greedy, one process, the ways in turn, tokens compared. Prompts of 64 tokens
without a picture; the time is that of all steps, the prompt's pass taken off. A step cannot be
quicker than reading the decoder's weights once: the bound is their bytes by the bandwidth of a
copy, measured in the same run.
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
from rich.progress import track
from rich.table import Table
from shapes import SHAPES, STOP_ID, write_llava

from vlm.assistant import load
from vlm.engine.compiled import CompiledDecoder
from vlm.engine.request import Request
from vlm.engine.runner import Engine
from vlm.engine.sampling import Sampling
from vlm.processor import Encoded

PROMPT = 64
Tokens = list[list[int]]


def prompts_of(rows: int) -> Tokens:
    """Different ones of the same length, of tokens that are no special ones."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(300, 4000, (rows, PROMPT), generator=draw).tolist()


def by_generate(model: Any, prompts: Tokens, new: int) -> Tokens:
    """One call for all rows."""
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        found = model.language_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=0,
        )
    return found[:, PROMPT:].tolist()


def by_engine(engine: Engine, prompts: Tokens, new: int) -> Tokens:
    """All rows together."""
    engine.prefixes.clear()
    sampling = Sampling(max_new_tokens=new, stop_loops=False)
    requests = [Request(Encoded(ids, [False] * len(ids), []), sampling) for ids in prompts]
    return [list(done.ids) for done in engine.generate(requests)]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device)[0] for _ in range(5)]
    return 2 * source.numel() / min(times)


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long a call takes, the device's work included."""
    started = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dtype = getattr(torch, options.dtype)
        folder = write_llava(Path(name), options.scale, dtype=dtype)
        assistant = load(folder, device=options.device, dtype=options.dtype)
    model, processor = assistant.engine.model, assistant.processor
    processor.eos_token_ids = frozenset({STOP_ID})
    plain, compiled = Engine(model, processor), Engine(model, processor, compile=True)
    for engine in (plain, compiled):
        engine.optimize()
    ways: dict[str, Callable[[Tokens, int], Tokens]] = {
        "generate": lambda prompts, new: by_generate(model, prompts, new),
        "vlm": lambda prompts, new: by_engine(plain, prompts, new),
        "vlm, compiled": lambda prompts, new: by_engine(compiled, prompts, new),
    }
    weights = sum(p.numel() * p.element_size() for p in model.language_model.parameters())
    bound = bandwidth(model.device) / weights
    title = f"{options.scale}, {options.dtype}, {model.device}, {torch.get_num_threads()} threads; "
    table = Table(title=title + f"bound {bound:,.0f} steps/s")
    for column in ("rows", "way", "steps/s", "of the bound", "x generate", "same tokens"):
        table.add_column(column, justify="right")
    for rows in options.rows:
        measured(table, ways, prompts_of(rows), options, model.device, bound)
    Console().print(table)
    assert isinstance(compiled._decode, CompiledDecoder)
    for (rows, positions), took in compiled._decode.seconds.items():
        Console().print(f"compiling {rows} rows x {positions} positions once: {took:.1f} s")


def measured(
    table: Table,
    ways: dict[str, Callable[[Tokens, int], Tokens]],
    prompts: Tokens,
    options: Any,
    device: torch.device,
    bound: float,
) -> None:
    """Rows of the table, for prompts that run together."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Tokens] = {}
    for number in track(range(options.rounds + 1), f"{len(prompts)} rows", transient=True):
        for name, way in ways.items():
            first, _ = seconds(lambda: way(prompts, 1), device)  # noqa: B023
            whole, found[name] = seconds(lambda: way(prompts, options.new), device)  # noqa: B023
            if number:
                rates[name].append((options.new - 1) / max(whole - first, 1e-9))
    peer = statistics.median(rates["generate"])
    for name, values in rates.items():
        rate = statistics.median(values)
        same = sum(a == b for a, b in zip(found[name], found["generate"], strict=True))
        cells = (f"{rate:,.1f}", f"{rate / bound:.0%}", f"{rate / peer:.2f}", f"{same}")
        table.add_row(str(len(prompts)), name, *cells)


if __name__ == "__main__":
    main()
