"""Captioning by Ray: one writer of the ledger, and workers that each hold the model.

Chunks of pictures go to actors; their results come back in the order of the pictures, so
the ledger is written as by one process. A worker that dies is started again by Ray with the
chunk that it had, whose results nobody has seen yet: none is lost and none comes twice.
"""

import contextlib
import logging
import os
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from vlm.assistant import Assistant

_TOGETHER = 2  # chunks that a worker has at work, so that the model never waits for one's end
_AHEAD = 1  # chunks that wait at a worker beside those
_TRIES = 3  # times that a worker is started again before the run ends with an error
_REMEMBERED = 100_000  # captions that a worker keeps for pictures of the same bytes


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
        workers: how many; None for one a GPU of the cluster, and at least one.
        options: further keywords of `load`.
    """

    model: str | None
    workers: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        assistant: Any,
        items: Iterable[Item],
        prompts: CaptionPrompts,
        batch_size: int,
        sampling: Mapping[str, Any],
        find: Find | None = None,
    ) -> Generator[CaptionResult]:
        """See `vlm.caption_pipeline.results`; copies are found within a worker only.

        Raises:
            MissingExtraError: Ray is not installed.
            ConfigError: the cluster has fewer GPUs than workers, or none is to be had by number.
            GenerationError: a worker died again and again.
        """
        ray = _ray()
        with _cluster(ray):
            actors = self._start(ray, (prompts, batch_size, sampling))
            try:
                yield from _in_order(ray, actors, items, batch_size)
            finally:
                for actor in actors:
                    ray.kill(actor)

    def _start(self, ray: Any, job: tuple[Any, ...]) -> list[Any]:
        """The workers, with an equal share of the processors each where there is one machine."""
        device = str(self.options.get("device", "auto"))
        if device.startswith("cuda:"):
            raise ConfigError(f"device {device}: Ray gives each worker a GPU of its own; use cuda")
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0)) if device in ("auto", "cuda") else 0
        number = self.workers or max(1, gpus)
        if 0 < gpus < number:
            raise ConfigError(f"{number} workers need a GPU each, and Ray has {gpus}; use fewer")
        nodes = sum(node["Alive"] for node in ray.nodes())
        share = int(have.get("CPU", 0)) // number
        actor = ray.remote(
            num_cpus=share if nodes == 1 else min(share, 1),  # 0 waits for nothing
            num_gpus=min(gpus, 1),
            max_restarts=_TRIES,
            max_concurrency=_TOGETHER,
        )(_Worker)
        here = self.model is not None and os.path.isdir(self.model)
        model = os.path.abspath(str(self.model)) if here else self.model
        return [actor.remote(model, dict(self.options), *job) for _ in range(number)]


def _in_order(
    ray: Any, actors: list[Any], items: Iterable[Item], size: int
) -> Iterator[CaptionResult]:
    """Results of all items in their order; a few chunks are on their way at a time."""
    source = iter(items)
    chunks = enumerate(iter(lambda: list(islice(source, size)), []))
    pending: deque[Any] = deque()
    try:
        while True:
            room = (_TOGETHER + _AHEAD) * len(actors) - len(pending)
            for number, chunk in islice(chunks, room):
                method = actors[number % len(actors)].caption.options(max_task_retries=-1)
                pending.append(method.remote(chunk))
            if not pending:
                return
            yield from ray.get(pending[0])
            pending.popleft()
    except ray.exceptions.RayActorError as error:
        raise GenerationError(
            f"a Ray worker died {_TRIES + 1} times ({' '.join(str(error).split())[:200]}); "
            "run the same command again, with fewer workers or a smaller batch"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for each in pending:  # else Ray would try them again, and say so
            ray.cancel(each)


class _Worker:
    """Holds the model; lives in a process of Ray's, whose threads call `caption`."""

    def __init__(
        self,
        model: str | None,
        options: dict[str, Any],
        prompts: CaptionPrompts,
        batch_size: int,
        sampling: Mapping[str, Any],
    ) -> None:
        self._open = model, options
        self._prompts, self._batch_size, self._sampling = prompts, batch_size, sampling
        self._assistant: Assistant | None = None
        self._known: OrderedDict[bytes, CaptionResult] = OrderedDict()
        self._lock = threading.Lock()

    def caption(self, items: list[Item]) -> list[CaptionResult]:
        """Results of a chunk, in its order; pictures of the same bytes are captioned once.

        Raises:
            VlmError: as `vlm.assistant.load` and `vlm.caption_pipeline.results`. Opened here
                and not as the worker starts, where any error would be a worker's death.
        """
        with self._lock:
            if self._assistant is None:
                from vlm.assistant import load

                model, options = self._open
                self._assistant = load(model, **options)
        job = self._prompts, self._batch_size, self._sampling, self._known.get
        made = list(results(self._assistant, items, *job))
        with self._lock:
            self._remember(made)
        return made

    def _remember(self, made: list[CaptionResult]) -> None:
        for each in made:
            if each.caption is not None and each.sha256 is not None:
                same = self._prompts.same(each.sha256, each.questions or {})
                self._known.setdefault(same, each)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


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
    here = str(Path(__file__).resolve().parents[1])  # also where vlm runs from a checkout
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _own_sigterm():
            ray.init(
                address=address or "local",  # which asks for a token of its user alone
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"Ray does not start ({' '.join(str(error).split())[:200]}); set RAY_ADDRESS to a "
            "cluster that runs, or unset it for this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own, which would end a run with another exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
