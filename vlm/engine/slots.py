"""Keys and values of all running rows, side by side, written in place.

Shapes: R places for rows, G key-value heads, S positions, E head width, n tokens a step.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

_GROWTH = 64  # positions; growing copies everything, so it must be rare
Layers = list[tuple[torch.Tensor, torch.Tensor]]
current = threading.local()  # the step that runs in this thread, see `vlm.engine.attention`


@dataclass(frozen=True)
class Segment:
    """A prompt, or the rest of one, on its way into a place.

    Attributes:
        place: of the row.
        start: positions that the place holds already.
        length: tokens to be added.
    """

    place: int
    start: int
    length: int


@dataclass
class Step:
    """What one pass of the decoder computes.

    Attributes:
        lengths: positions in each running row's place before its newest token.
        segments: prompts, in places after those of the running rows.
    """

    lengths: list[int]
    segments: list[Segment]
    masks: dict[object, torch.Tensor] = field(default_factory=dict)

    def only_run(self) -> Segment | None:
        """The tokens of the step, if a single row is all that runs."""
        if len(self.lengths) + len(self.segments) != 1:
            return None
        run = self.segments[0] if self.segments else Segment(0, self.lengths[0], 1)
        return run if run.place == 0 else None

    def position_ids(self) -> list[int]:
        """Position of each of the n tokens in its own row."""
        ids = list(self.lengths)
        for segment in self.segments:
            ids.extend(range(segment.start, segment.start + segment.length))
        return ids

    def last_tokens(self) -> list[int]:
        """Index of each row's last token among the n tokens."""
        ends = list(range(len(self.lengths)))
        end = len(self.lengths)
        for segment in self.segments:
            end += segment.length
            ends.append(end - 1)
        return ends


class SlotCache(Cache):
    """A cache that transformers' decoders write to and `vlm.engine.attention` reads from.

    Every position holds finite numbers at all times: a masked position has a weight of
    zero in attention, and zero times NaN would be NaN.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []  # a layer: (R, G, S, E)
        self.values: list[torch.Tensor] = []
        self._rows = self._positions = 0

    def reserve(self, rows: int, positions: int) -> None:
        """Make room; what is there stays."""
        if rows <= self._rows and positions <= self._positions:
            return
        self._rows = max(rows, self._rows)
        if positions > self._positions:
            # A row alone is the next turn of a chat, mostly, and more of them will come.
            spare = positions // 4 if self.single else 0
            self._positions = -(-(positions + spare) // _GROWTH) * _GROWTH
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                new = old.new_zeros(self._rows, old.shape[1], self._positions, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                store[i] = new

    def release(self) -> None:
        """Give all memory back."""
        self.keys, self.values = [], []
        self._rows = self._positions = 0

    def wipe(self, place: int) -> None:
        """Zero a place that numbers without meaning were written to."""
        if self.single:  # its tensors may be another's too, see `take_over`
            self.release()
        for store in (self.keys, self.values):
            for layer in store:
                layer[place].zero_()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row of `length` positions into another place."""
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length] = layer[source, :, :length]

    def copy_out(self, place: int, length: int) -> Layers:
        """Keys and values (G, length, E) of a row, layer by layer."""
        pairs = zip(self.keys, self.values, strict=True)
        return [(k[place, :, :length].clone(), v[place, :, :length].clone()) for k, v in pairs]

    def hand_over(self, place: int, length: int) -> Layers:
        """As `copy_out` of a row that ends: if it is alone, nothing is copied or remains here."""
        if not self.single or 3 * length < 2 * self._positions:  # a third may be spare
            return self.copy_out(place, length)
        pairs = zip(self.keys, self.values, strict=True)
        row = [(k[0, :, :length], v[0, :, :length]) for k, v in pairs]
        self.release()
        return row

    @property
    def single(self) -> bool:
        """Whether there is room for one row only."""
        return self._rows == 1

    def copy_in(self, place: int, length: int, row: Layers) -> None:
        """Put the first `length` positions of a row that was copied out into a place."""
        for layer, (keys, values) in enumerate(row):
            self.start_layer(layer, keys[None], values[None])
            self.keys[layer][place, :, :length] = keys[:, :length]
            self.values[layer][place, :, :length] = values[:, :length]

    def take_over(self, row: Layers, positions: int) -> None:
        """Go on with a row that was handed over, as the only one, where it lies.

        Its own positions are not written to, what lies behind them is.

        Args:
            row: of which `vlm.engine.prefixes.PrefixStore.claim` holds.
            positions: to make room for, if there is less.
        """
        self.keys, self.values = ([_whole(t) for t in part] for part in zip(*row, strict=True))
        self._rows, self._positions = 1, self.keys[0].shape[2]
        self.reserve(1, positions)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values (1, G, n, E) into their rows' places."""
        self.start_layer(layer_idx, key_states, value_states)
        step: Step = current.step
        count = len(step.lengths)
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            layer, new = store[layer_idx], states[0].transpose(0, 1)  # (n, G, E)
            if count:
                layer[current.rows, :, current.positions] = new[:count]
            offset = count
            for s in step.segments:
                layer[s.place, :, s.start : s.start + s.length] = states[
                    0, :, offset : offset + s.length
                ]
                offset += s.length
        current.layer = (self.keys[layer_idx], self.values[layer_idx])
        return key_states, value_states

    def write(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (n, G, E) of the first row from a position on.

        Returns:
            All keys and values of the row, (1, G, S, E).
        """
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        self.start_layer(layer, keys[None], values[None])
        held = self.keys[layer][:1], self.values[layer][:1]
        end = start + keys.shape[1]
        held[0][0, :, start:end] = keys
        held[1][0, :, start:end] = values
        return held

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (R, G, S, E) of a layer."""
        return self.keys[index], self.values[index]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given to every call."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Unused: attention makes its own masks."""
        return query_length, 0

    def start_layer(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Make room for a layer with states of these shapes, if it is the next one."""
        if layer == len(self.keys):
            for store, states in ((self.keys, keys), (self.values, values)):
                shape = (self._rows, states.shape[1], self._positions, states.shape[3])
                store.append(states.new_zeros(shape))


def capacity(states: torch.Tensor) -> int:
    """Positions that the memory of one layer's keys or values (G, length, E) has room for."""
    groups, _, width = states.shape
    return states.untyped_storage().nbytes() // (states.element_size() * groups * width)


def _whole(states: torch.Tensor) -> torch.Tensor:
    """All the memory (1, G, S, E) behind a row that was handed over, (G, length, E)."""
    (groups, _, width), positions = states.shape, capacity(states)
    size = positions * width
    return states.as_strided((1, groups, positions, width), (groups * size, size, width, 1))


def affordable(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Positions, of all rows together, that a decoder's keys and values have memory for.

    That is 4 GiB, or half of what is free on a GPU.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    each = 2 * config.num_hidden_layers * groups * width * dtype.itemsize
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[0] // 2 if on_gpu else 4 * 2**30
    return int(memory // each)
