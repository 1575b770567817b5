"""Prompts through the model: what waits is admitted, what runs gets one token a step.

Any thread that waits for an answer may take the step that brings all running answers forward,
in the order of asking; the engine has no thread of its own. Requests that arrive meanwhile
join at the next step. Shapes: B rows running, V vocabulary.
"""

import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch

from vlm.engine.cache import FeatureCache
from vlm.engine.decoders import arrange, choose
from vlm.engine.features import Encoder
from vlm.engine.in_order import answer_all
from vlm.engine.prefixes import PrefixStore, shared_length
from vlm.engine.request import Completion, Request, Row
from vlm.engine.sampling import BAD_LOGITS, Draw, draw_rows
from vlm.engine.scheduler import Scheduler
from vlm.engine.slots import Segment, Step, affordable
from vlm.engine.task import Task
from vlm.engine.turns import TurnLock
from vlm.errors import GenerationError
from vlm.model import VisionLanguageModel
from vlm.processor import Processor

_LEAST_SHARED = 16  # positions worth copying instead of computing


class Engine:
    """Owns a model at run time; all its methods may be called from several threads.

    Args:
        model: in evaluation mode; its weights must not change while the engine lives.
        processor: of the same folder.
        identity: of the weights, for cache keys; by default unique to this engine.
        cache: for visual tokens; by default of 256 MiB.
        prefixes: for keys and values of earlier prompts; by default of 1 GiB.
        scheduler: how many run together; by default 32, fewer where keys and values would
            need more than 4 GiB, or half of a GPU's free memory.
        compile: decode steps, see `vlm.engine.compiled`.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        identity: str | None = None,
        cache: FeatureCache | None = None,
        prefixes: PrefixStore | None = None,
        scheduler: Scheduler[Task] | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.cache = FeatureCache() if cache is None else cache
        self.prefixes = PrefixStore() if prefixes is None else prefixes
        self.scheduler = Scheduler[Task]() if scheduler is None else scheduler
        if scheduler is None:
            config = model.config.text_config
            self.scheduler.max_positions = affordable(config, model.dtype, model.device)
        self.identity = identity or uuid.uuid4().hex[:16]
        self.encoder = Encoder(model, processor, self.identity, self.cache)
        self.lock = TurnLock()
        self._arranged = 0  # 1 in place, 2 with copies
        self._decode, self._slots = choose(model, compile)

    def ahead(self, request: Request) -> Request:
        """The request with its pixels made, for a thread that need not wait for the model."""
        images = request.prompt.images
        for image in images:
            _ = image.sha256  # computed here, for the cache
        return dataclasses.replace(request, pixel_values=self.processor.pixel_values(images))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests; results in the order of the requests.

        Raises:
            ContextLengthError: a prompt does not fit; nothing is computed then.
            GenerationError: the model computes NaN, or memory does not suffice for one row.
            QueueFullError: too many requests wait already.
        """
        tasks = self.submit(requests)
        if len(tasks) > 1:
            self.optimize()
        self._drive(tasks)
        return [task.result() for task in tasks]

    def stream(self, request: Request) -> Iterator[Row]:
        """Answer one request; yields its row after every step, the last time ended.

        Raises:
            ContextLengthError: the prompt does not fit; raised here, before the first step.
            GenerationError: the model computes NaN; raised by a step.
            QueueFullError: too many requests wait already; raised here.
        """
        (task,) = self.submit([request])
        if request.keep and not self._arranged:
            self.optimize(copies=False)
        return self._steps(task)

    def generate_all(
        self, requests: Iterable[Request], places: int | None = None
    ) -> Iterator[Completion]:
        """Answer any number of requests, in their order, with a bounded number in memory.

        Args:
            requests: taken in a thread while earlier ones run, see `answer_all`.
            places: requests that run together; by default as many as the engine has.

        Raises:
            ContextLengthError: a prompt does not fit; raised in its turn, as the next are.
            GenerationError: the model computes NaN, or memory does not suffice for one row.
            Exception: what `requests` raises, once all requests before it are answered.
        """
        return answer_all(self, requests, places or self.scheduler.max_running)

    @contextmanager
    def desk(self, places: int) -> Iterator["Engine"]:
        """The engine for a job of which `places` items run together: room for so many rows."""
        with self.lock:
            more = max(0, places - self.scheduler.max_running)
            self.scheduler.max_running += more
        try:
            yield self
        finally:
            with self.lock:
                self.scheduler.max_running -= more

    def submit(self, requests: Sequence[Request]) -> list[Task]:
        """Put requests into the queue; `generate` and `stream` bring them forward."""
        tasks = [Task(request, self.processor, self.encoder) for request in requests]
        with self.lock:
            self.scheduler.submit(tasks)
        return tasks

    def optimize(self, copies: bool = True) -> None:
        """Rearrange weights for faster steps where the hardware gains by it; done once.

        Args:
            copies: for steps of several rows too, which takes the weights' memory once more.
        """
        with self.lock:
            if self._arranged > copies:
                return
            arrange(self._decode, self.model, copies)
            self._arranged = 1 + copies

    def step(self) -> bool:
        """One token for every running request, new ones included; False if none is left."""
        with self.lock:
            return self._step()

    def _drive(self, tasks: Sequence[Task]) -> None:
        try:
            while not all(task.ended for task in tasks):
                self.step()
        finally:  # an interrupt in one thread must not leave rows running for nobody
            for task in tasks:
                task.abandon()

    def _steps(self, task: Task) -> Iterator[Row]:
        told = 0
        try:
            while True:
                with self.lock:
                    if not task.ended and len(task.ids) == told:
                        self._step()
                if task.error is not None:
                    raise task.error
                if len(task.ids) > told or task.ended:
                    told = len(task.ids)
                    yield task
                if task.ended:
                    return
        finally:  # the reader went away
            task.abandon()

    @torch.inference_mode()
    def _step(self) -> bool:
        for task in self.scheduler.jobs():
            task.cancel_if_asked(time.monotonic())
        self._retire()
        old = list(self.scheduler.running)
        new = self.scheduler.admit()
        if not old and not new:
            return False
        try:
            self._advance(old, new)
        except torch.OutOfMemoryError as error:
            self._shed(old, new, error)
        except Exception as error:
            for task in (*old, *new):
                task.error = error
        self._retire()
        return len(self.scheduler) > 0

    def _advance(self, old: list[Task], new: list[Task]) -> None:
        ends = [task.length + 1 for task in old] + [len(task.tokens) for task in new]
        self._slots.reserve(len(ends), max(ends))
        for place, task in enumerate(new, len(old)):
            task.length = self._take_over(place, task)
        step = Step(
            [task.length for task in old],
            [
                Segment(place, task.length, len(task.tokens) - task.length)
                for place, task in enumerate(new, len(old))
            ],
        )
        logits = self._forward(step, old, new)
        draws = self._draw([*old, *new], logits)
        # Nothing below fails, so that after an error above the step can be taken again.
        for task in new:
            task.length = len(task.tokens)
        for task in old:
            task.length += 1
        if len(new) > 1:
            self._keep_shared(len(old), *new[:2])
        self._take([*old, *new], draws)

    def _keep_shared(self, place: int, first: Task, second: Task) -> None:
        """Keep what two new prompts begin with, such as a system text, for those to come."""
        shared = shared_length(first.tokens, second.tokens)
        if shared >= _LEAST_SHARED and self.prefixes.match(first.tokens)[0] < shared:
            self._keep(first.tokens[:shared], place)

    def _keep(self, sequence: np.ndarray, place: int, ends: bool = False) -> None:
        """Keep the row's keys and values for later prompts, if there is memory for them."""
        take = self._slots.hand_over if ends else self._slots.copy_out
        with suppress(torch.OutOfMemoryError):
            self.prefixes.keep(sequence, take(place, len(sequence)))

    def _take_over(self, place: int, task: Task) -> int:
        """Fill a place with what an earlier prompt has in common; how much that is."""
        shared, kept = self.prefixes.match(task.tokens)
        shared = min(shared, len(task.tokens) - 1)  # the last position gives the first token
        if kept is None or shared < _LEAST_SHARED:
            return 0
        if self._slots.single and shared == len(kept.tokens) and self.prefixes.claim(kept):
            self._slots.take_over(kept.layers, len(task.tokens))
        else:
            self._slots.copy_in(place, shared, kept.layers)
        return shared

    def _forward(self, step: Step, old: list[Task], new: list[Task]) -> torch.Tensor:
        """One pass over the newest tokens and the new prompts; logits (B, V)."""
        model, device = self.model, self.model.device
        newest = torch.tensor([[task.ids[-1] for task in old]], dtype=torch.long, device=device)
        # Not through `embed`: a model may well write its image token, as a token like any other.
        embeds = model.get_input_embeddings()(newest)
        if new:
            ids = [i for task in new for i in task.request.prompt.input_ids[task.length :]]
            features = self.encoder.encode_rests([(task.request, task.length) for task in new])
            prompts = model.embed(torch.tensor([ids], device=device), features)
            embeds = torch.cat([embeds, prompts], dim=1)
        return model.logits(self._decode(embeds, step, self._slots))

    def _draw(self, tasks: list[Task], logits: torch.Tensor) -> list[Draw | None]:
        logits[:, self.processor.never_text] = -torch.inf
        return draw_rows(logits, [task.sampler for task in tasks])

    def _take(self, tasks: list[Task], draws: list[Draw | None]) -> None:
        for place, (task, draw) in enumerate(zip(tasks, draws, strict=True)):
            if draw is None:
                self._slots.wipe(place)
                task.error = GenerationError(task.sampler.failure or BAD_LOGITS)
            else:
                task.take(draw)

    def _retire(self) -> None:
        """Ended rows leave; a row that asked for it leaves its keys and values behind."""
        for place, task in enumerate(self.scheduler.running):
            if task.ended and task.error is None and task.request.keep and task.length:
                self._keep(task.sequence(), place, ends=True)
        self.scheduler.retire(self._move)
        if not self.scheduler.running:
            self._slots.release()  # a kept sequence may lie there

    def _move(self, source: int, target: int) -> None:
        self._slots.move(source, target, self.scheduler.running[target].length)

    def _shed(self, old: list[Task], new: list[Task], error: torch.OutOfMemoryError) -> None:
        """Go on with less: half of the new rows wait, or one row ends with the error."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(new) > 1:
            self.scheduler.put_back(new)
            self.scheduler.max_step_tokens = max(1, sum(task.num_tokens for task in new) // 2)
            return
        victim = new[-1] if new else max(old, key=lambda task: task.length)
        victim.error = GenerationError(
            f"out of memory for a prompt of {victim.num_tokens} positions beside {len(old)} "
            f"running answers ({error}); use fewer pictures, a smaller batch or quantize='4bit'"
        )
