"""Numbers of the API for Prometheus."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from serve.api.desk import Job

if TYPE_CHECKING:
    from vlm.engine.generate import GenerateEngine
    from vlm.engine.runner import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """All numbers of one server, in a registry of their own.

    Args:
        engine: whose queue, caches and memory are shown.
        under_way: requests of the API that are not over.
    """

    def __init__(self, engine: "Engine | GenerateEngine", under_way: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that are over, by status.", "status")
        self.tokens = self._counter("tokens", "Tokens of prompts, and generated ones.", "kind")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival to the first token.", _SECONDS
        )
        self.rate = self._histogram(
            "tokens_per_second", "Of one answer, from its first token to its last.", _RATES
        )
        self._gauge("requests_under_way", "Requests that are not over.", under_way)
        ProcessCollector(registry=self._registry)  # process_resident_memory_bytes and more
        self._of_engine(engine)

    def note(self, jobs: Sequence[Job], arrived: float) -> None:
        """Count the answers of a request that is over.

        Args:
            jobs: at least one.
            arrived: when the request did, by `time.monotonic`.
        """
        self.tokens.labels("prompt").inc(len(jobs[0].request.prompt.input_ids))
        for job in jobs:
            number = 0 if job.row is None else len(job.row.ids)
            self.tokens.labels("generated").inc(number)
            if job.first is not None:
                self.first_token.observe(job.first - arrived)
                if job.last is not None and job.last > job.first:
                    self.rate.observe((number - 1) / (job.last - job.first))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _of_engine(self, engine: "Engine | GenerateEngine") -> None:
        scheduler = getattr(engine, "scheduler", None)
        if scheduler is not None:
            self._gauge("queue_waiting", "Answers that wait.", lambda: len(scheduler.waiting))
            self._gauge("queue_running", "Answers that advance.", lambda: len(scheduler.running))
        cache = getattr(engine, "cache", None)
        if cache is not None:
            about = "Pictures whose visual tokens were"
            self._gauge("feature_cache_hits", f"{about} known.", lambda: cache.hits)
            self._gauge("feature_cache_misses", f"{about} computed.", lambda: cache.misses)
            self._gauge("feature_cache_bytes", "Bytes of visual tokens.", lambda: cache.nbytes)
        prefixes = getattr(engine, "prefixes", None)
        if prefixes is not None:
            self._gauge("prefix_cache_bytes", "Bytes of kept prompts.", lambda: prefixes.nbytes)
        device = engine.model.device
        if device.type == "cuda":
            self._gauge(
                "gpu_memory_bytes", "Of tensors.", lambda: torch.cuda.memory_allocated(device)
            )

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"vlm_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vlm_{name}", about, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(f"vlm_{name}", about, registry=self._registry).set_function(value)
