"""Decode steps compiled for fixed shapes: on CUDA, one launch instead of hundreds.

A small step on a GPU spends its time starting kernels. Here a step works on memory that stays
where it is, in shapes of which there are few: R rows and S positions, each a power of two. For
every (R, S) the lean layers are compiled once by `torch.compile` and, on CUDA, recorded once
as a CUDA graph. Prompts, whose lengths are all different, run as before.

Shapes: R places for rows, B of them in use, G key-value heads, S positions, E head width,
D width.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from vlm.engine.attention import dot_product
from vlm.engine.lean import LeanDecoder
from vlm.engine.slots import SlotCache, Step

LEAST_POSITIONS = 256
_MAX_SHAPES = 64  # compiled ones; torch's own limit is 8, which is fewer than there are
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)
Shape = tuple[int, int]
Layers = list[torch.Tensor]  # of each layer (R, G, S, E)
# Of each place the newest token's state (R, D) and position (R,), and its angles (R, 1, E) twice.
Taken = tuple[torch.Tensor, ...]
Run = Callable[[Taken, Layers, Layers], torch.Tensor]
log = logging.getLogger(__name__)


class StaticSlotCache(SlotCache):
    """Places whose memory grows by doubling and is then kept, so that shapes recur."""

    def reserve(self, rows: int, positions: int) -> None:
        """Make room for at least so much; what is there stays."""
        super().reserve(_power(rows), max(LEAST_POSITIONS, _power(positions)))

    def release(self) -> None:
        """Keep the memory: recorded steps write to it. `wipe` makes numbers finite again."""

    @property
    def single(self) -> bool:
        """Never: a row's memory is not handed over while recorded steps write to it."""
        return False

    @property
    def shape(self) -> Shape:
        """(R, S) of the memory."""
        return self._rows, self._positions


class CompiledDecoder:
    """Runs the steps of a lean decoder, those of one token a row in compiled form.

    A shape that cannot be compiled runs as before; the log says so once.

    Args:
        lean: that gives the decoder's own numbers.
        backend: of `torch.compile`.

    Attributes:
        lean: as given.
        seconds: that each shape (R, S) took to be made ready.
    """

    def __init__(self, lean: LeanDecoder, backend: str = "inductor") -> None:
        self.lean = lean
        self.seconds: dict[Shape, float] = {}
        self._compiled = torch.compile(self._layers, backend=backend, fullgraph=True, dynamic=False)
        self._steps: dict[Shape, Run] = {}
        self._memory: int | None = None
        self._usable = True

    def __call__(self, embeds: torch.Tensor, step: Step, cache: SlotCache) -> torch.Tensor:
        """Embeddings (1, n, D) to final states (B, D) of each row's last token."""
        if step.segments or not self._usable or not isinstance(cache, StaticSlotCache):
            return self.lean(embeds, step, cache)
        try:
            return self._decode(embeds[0], step.lengths, cache)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            self._usable = False
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            log.warning(
                "steps of shape %s cannot be compiled here (%s: %s): they run uncompiled",
                cache.shape,
                type(error).__name__,
                reason,
            )
            return self.lean(embeds, step, cache)

    def _decode(
        self, embeds: torch.Tensor, lengths: Sequence[int], cache: StaticSlotCache
    ) -> torch.Tensor:
        """(B, D) to (B, D), as the first of R rows; the places of the others are free."""
        rows, count = cache.shape[0], len(lengths)
        states = embeds.new_zeros(rows, embeds.shape[1])
        states[:count] = embeds
        places = [*lengths, *[0] * (rows - count)]
        taken = (
            states,
            torch.tensor(places, device=embeds.device),
            *self.lean.rotary.at(places, embeds),
        )
        memory = cache.keys[0].data_ptr()
        if memory != self._memory:  # it has grown: recorded steps know the old place
            self._steps.clear()
            self._memory = memory
        run = self._steps.get(cache.shape) or self._prepare(taken, cache)
        return run(taken, cache.keys, cache.values)[:count]

    def _prepare(self, taken: Taken, cache: StaticSlotCache) -> Run:
        started = time.perf_counter()
        log.info("compiling decode steps of %d rows and %d positions", *cache.shape)
        run: Run = self._compiled
        with torch._dynamo.config.patch(recompile_limit=_MAX_SHAPES):
            run(taken, cache.keys, cache.values)
        if taken[0].device.type == "cuda":
            run = _Recorded(run, taken, cache.keys, cache.values)
        self._steps[cache.shape] = run
        self.seconds[cache.shape] = time.perf_counter() - started
        log.info("ready after %.1f s", self.seconds[cache.shape])
        return run

    def _layers(self, taken: Taken, keys: Layers, values: Layers) -> torch.Tensor:
        """All layers for the newest token of each place: to (R, D)."""
        states, positions, cos, sin = taken
        rows = torch.arange(len(states), device=states.device)
        seen = torch.arange(keys[0].shape[2], device=states.device)
        masks: dict[int | None, torch.Tensor] = {}
        for i, block in enumerate(self.lean.blocks):
            if block.window not in masks:
                masks[block.window] = _mask(seen, positions[:, None], block.window, states.dtype)
            query, key, value = block.heads(states, (cos, sin))
            keys[i][rows, :, positions] = key
            values[i][rows, :, positions] = value
            mixed = dot_product(
                query[:, :, None], keys[i], values[i], masks[block.window], block.scaling, None
            )
            states = block.close(states, mixed[:, :, 0].flatten(1))
        return self.lean.final(states)


class _Recorded:
    """A step as a CUDA graph over memory of its own for what goes in.

    Recorded after two plain runs of the very step that is asked for: a step writes the same
    keys and values however often it is run, so nothing is harmed by them.
    """

    def __init__(self, run: Run, taken: Taken, keys: Layers, values: Layers) -> None:
        self._taken = tuple(tensor.clone() for tensor in taken)
        device = taken[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(self._taken, keys, values)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, for pictures.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._out = run(self._taken, keys, values)

    def __call__(self, taken: Taken, keys: Layers, values: Layers) -> torch.Tensor:
        """(R, D); keys and values are those that it was recorded with."""
        for own, given in zip(self._taken, taken, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._out.clone()


def _mask(
    seen: torch.Tensor, newest: torch.Tensor, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """(R, 1, 1, S): zero for the positions that a row's newest token sees, -inf elsewhere."""
    hidden = seen > newest
    if window is not None:
        hidden = hidden | (seen <= newest - window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(hidden, -torch.inf)[:, None, None]


def _power(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()
