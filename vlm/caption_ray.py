"""Captioning by Ray: one writer of the ledger, and workers that each hold the model.

Chunks of pictures go to actors; their results come back in the order of the pictures, so
the ledger is written as by one process. A worker that dies is started again by Ray with the
chunk that it had, whose results nobody has seen yet: none is lost and none comes twice.
"""

import contextlib
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm import hub
from vlm.about import read_about
from vlm.caption_items import Item
from vlm.caption_pipeline import results
from vlm.caption_prompts import CaptionPrompts
from vlm.caption_reading import Find
from vlm.captioning import CaptionResult
from vlm.errors import ConfigError, GenerationError, MissingExtraError
from vlm.fingerprint import fingerprint
from vlm.folder import is_adapter, read_json

_AHEAD = 2  # chunks that wait at a worker beside the one it works on
_TRIES = 3  # times that a worker is started again before the run ends with an error


class RemoteModel(SimpleNamespace):
    """What the writer of a ledger must know of a model that only workers open.

    Attributes:
        name, identity, caption_prompt: as of `vlm.assistant.Assistant`.
        processor: has no settings of its own.
    """


def describe_model(model: str | None) -> RemoteModel:
    """The facts of a LLaVA folder, without its weights.

    Raises:
        CheckpointError: no such model.
        ConfigError: it is no LLaVA folder, whose prompt only the open model knows.
    """
    folder = hub.resolve(model)
    named = model is not None and not os.path.isdir(model)
    if not is_adapter(folder) and read_json(folder, "config.json").get("model_type") != "llava":
        raise ConfigError(f"{model} is no LLaVA folder; caption with --engine local")
    about = read_about(folder, str(model) if named else folder.resolve().name)
    return RemoteModel(
        name=about.name,
        identity=fingerprint(folder),
        caption_prompt=about.caption_prompt,
        processor=None,
    )


@dataclass(frozen=True)
class RayEngine:
    """Captions by workers; takes the place of `vlm.caption_pipeline.results`.

    Args:
        model: that each worker opens; see `vlm.assistant.load`.
        workers: how many.
        options: further keywords of `load`.
    """

    model: str | None
    workers: int = 1
    options: Mapping[str, Any] = None  # type: ignore[assignment]

    def __call__(
        self,
        assistant: Any,
        items: Iterable[Item],
        prompts: CaptionPrompts,
        batch_size: int,
        sampling: Mapping[str, Any],
        find: Find | None = None,
    ) -> Generator[CaptionResult]:
        """See `vlm.caption_pipeline.results`; copies are found within a worker.

        Raises:
            MissingExtraError: Ray is not installed.
            GenerationError: a worker died again and again.
        """
        ray = _ray()
        with _cluster(ray):
            device = (self.options or {}).get("device", "auto")
            gpus = 1 if device in ("auto", "cuda") and ray.cluster_resources().get("GPU") else 0
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=_TRIES)(_Worker)
            actors = [
                remote.remote(self.model, dict(self.options or {}), prompts, batch_size, sampling)
                for _ in range(self.workers)
            ]
            try:
                yield from _in_order(ray, actors, items, batch_size)
            finally:
                for actor in actors:
                    ray.kill(actor)


def _in_order(
    ray: Any, actors: list[Any], items: Iterable[Item], size: int
) -> Iterator[CaptionResult]:
    """Results of all items in their order; a few chunks are on their way at a time."""
    source = iter(items)
    chunks = iter(lambda: list(islice(source, size)), [])
    pending: deque[Any] = deque()
    number = 0
    while True:
        while len(pending) < (1 + _AHEAD) * len(actors):
            chunk = next(chunks, None)
            if chunk is None:
                break
            method = actors[number % len(actors)].caption.options(max_task_retries=-1)
            pending.append(method.remote(chunk))
            number += 1
        if not pending:
            return
        try:
            yield from ray.get(pending.popleft())
        except ray.exceptions.RayActorError as error:
            raise GenerationError(
                f"a Ray worker died {_TRIES + 1} times ({' '.join(str(error).split())[:200]}); "
                "run the same command again, with fewer workers or a smaller batch"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error


class _Worker:
    """Holds the model; lives in a process of Ray's."""

    def __init__(
        self,
        model: str | None,
        options: dict[str, Any],
        prompts: CaptionPrompts,
        batch_size: int,
        sampling: Mapping[str, Any],
    ) -> None:
        from vlm.assistant import load

        self._assistant = load(model, **options)
        self._prompts, self._batch_size, self._sampling = prompts, batch_size, sampling

    def caption(self, items: list[Item]) -> list[CaptionResult]:
        """Results of a chunk, in its order; pictures of the same bytes are captioned once."""
        known: dict[bytes, CaptionResult] = {}
        made = results(
            self._assistant, items, self._prompts, self._batch_size, self._sampling, known.get
        )
        return list(made)

    def process(self) -> int:
        """The worker's process id."""
        return os.getpid()


def count_gpus() -> int:
    """How many GPUs this machine has; at least 1."""
    import torch

    return max(1, torch.cuda.device_count())


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "--engine ray needs Ray, which is not installed; pip install 'vlm[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or one of this machine for as long as it is needed."""
    if ray.is_initialized():
        yield
        return
    here = str(Path(__file__).resolve().parents[1])  # workers start in a folder of Ray's
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    ray.init(
        address=os.environ.get("RAY_ADDRESS"),
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()
