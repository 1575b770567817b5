"""Many clients of the API at once: errors, cross-talk, memory, and tokens a second.

    python benchmarks/api_load.py
    python benchmarks/api_load.py --clients 100 --seconds 60 --json load.json

`vlm serve` runs the built-in model in a process of its own, on loopback. First every picture is
asked about alone, twice, which gives its answer and the speed of one request at a time. Then all
clients ask about random pictures, one request after the other each, every second one streamed,
until the time is over; each answer is compared with the one that its picture got alone. Memory is
the server's resident size, after a quarter of the time and at the end.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from vlm import testing

QUESTION = "describe the picture."
SERVE = [sys.executable, "-c", "from serve.cli import main; main()", "serve", "--port", "0"]


@dataclass
class Tally:
    """What came of the requests of all clients."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def body(seed: int, stream: bool) -> bytes:
    """A request about a picture that depends on the seed alone."""
    out = io.BytesIO()
    testing.draw_image((96, 96), seed=seed).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    asked: dict[str, Any] = {
        "model": "built-in",
        "messages": [{"role": "user", "content": parts}],
        "stream": stream,
    }
    if stream:
        asked["stream_options"] = {"include_usage": True}
    return json.dumps(asked).encode()


def read(reply: httpx.Response) -> tuple[str, int]:
    """Text and number of tokens of a reply, streamed or not."""
    if not reply.headers["content-type"].startswith("text/event-stream"):
        whole = reply.json()
        return whole["choices"][0]["message"]["content"], whole["usage"]["completion_tokens"]
    text, tokens = "", 0
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["code"])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
    return text, tokens


def one_at_a_time(url: str, bodies: list[bytes]) -> tuple[list[str], float]:
    """The answer to each picture, and tokens a second; the first round warms up."""
    with httpx.Client(headers={"content-type": "application/json"}, timeout=60) as client:
        for round_ in range(2):
            answers, tokens, started = [], 0, time.perf_counter()
            for each in bodies:
                reply = client.post(f"{url}/v1/chat/completions", content=each)
                reply.raise_for_status()
                text, number = read(reply)
                answers.append(text)
                tokens += number
            rate = tokens / (time.perf_counter() - started)
            assert round_ == 0 or answers
    return answers, rate


async def visit(
    url: str,
    number: int,
    bodies: tuple[list[bytes], list[bytes]],
    expected: list[str],
    end: float,
    tally: Tally,
) -> None:
    """One client until the end."""
    dice = random.Random(number)
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(headers=headers, timeout=60) as client:
        while time.perf_counter() < end:
            picture, stream = dice.randrange(len(expected)), dice.randrange(2)
            started = time.perf_counter()
            try:
                reply = await client.post(
                    f"{url}/v1/chat/completions", content=bodies[stream][picture]
                )
                tally.outcomes[str(reply.status_code)] += 1
                if reply.status_code != 200:
                    await asyncio.sleep(float(reply.headers.get("retry-after", 1)))
                    continue
                text, tokens = read(reply)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                tally.outcomes[type(error).__name__] += 1
                continue
            tally.wrong += text != expected[picture]
            tally.tokens += tokens
            tally.seconds.append(time.perf_counter() - started)


async def measure_memory(url: str, seconds: float, tally: Tally) -> None:
    """The server's resident size after a quarter of the time, a half, three quarters and all."""
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(4):
            await asyncio.sleep(seconds / 4)
            text = (await client.get(f"{url}/metrics")).text
            found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
            assert found is not None
            tally.memory.append(float(found[1]) / 2**20)


async def all_at_once(
    url: str,
    bodies: tuple[list[bytes], list[bytes]],
    expected: list[str],
    clients: int,
    seconds: float,
) -> tuple[Tally, float]:
    """What came of it, and tokens a second."""
    tally = Tally()
    started = time.perf_counter()
    end = started + seconds
    visits = (visit(url, i, bodies, expected, end, tally) for i in range(clients))
    await asyncio.gather(measure_memory(url, seconds, tally), *visits)
    return tally, tally.tokens / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    server = subprocess.Popen(SERVE, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert server.stdout is not None
        found = re.search(r"http://[\w.:]+", server.stdout.readline())
        assert found is not None, "the server did not start"
        url = found.group()
        bodies = tuple([body(i, stream) for i in range(given.pictures)] for stream in (False, True))
        expected, alone = one_at_a_time(url, bodies[0])
        tally, together = asyncio.run(
            all_at_once(url, (bodies[0], bodies[1]), expected, given.clients, given.seconds)
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    report(given, expected, alone, together, tally)


def report(
    given: argparse.Namespace, expected: list[str], alone: float, together: float, tally: Tally
) -> None:
    """A table, and a file if one was asked for."""
    waits = sorted(tally.seconds)
    facts = {
        "clients": given.clients,
        "seconds": given.seconds,
        "different answers among the pictures": len(set(expected)),
        "replies by status": dict(tally.outcomes),
        "answers of another picture": tally.wrong,
        "tokens/s one at a time": round(alone, 1),
        "tokens/s all at once": round(together, 1),
        "times as many": round(together / alone, 2),
        "seconds a request, median and 99 %": [
            round(waits[len(waits) // 2], 2),
            round(waits[len(waits) * 99 // 100], 2),
        ],
        "server's memory at each quarter, MiB": [round(each) for each in tally.memory],
    }
    table = Table("", "measured")
    for name, value in facts.items():
        table.add_row(name, str(value))
    Console().print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
