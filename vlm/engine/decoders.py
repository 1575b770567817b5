"""Which way a decoder is run: the fastest one that gives its own numbers.

Every way takes a step's embeddings (1, n, D) and gives the final states (B, D) of each row's
last token. A way is tried on a few tokens before it is used: a prompt alone, then one token
more of it beside another prompt, against one plain call of the decoder.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm.engine.attention import running
from vlm.engine.compiled import CompiledDecoder, StaticSlotCache
from vlm.engine.lean import LeanDecoder, lean_decoder
from vlm.engine.packed import pack_linears
from vlm.engine.slots import Segment, SlotCache, Step
from vlm.model import CACHE_ARGUMENT

Decode = Callable[[torch.Tensor, Step, SlotCache], torch.Tensor]
_TOLERANCE = {torch.float32: 1e-4}  # of the largest value
_HALF_TOLERANCE = 5e-2
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError)
log = logging.getLogger(__name__)


@torch.inference_mode()
def choose(model: Any, compile: bool = False) -> tuple[Decode, SlotCache]:
    """The way to run a model's decoder, and the memory that it runs on.

    Args:
        model: a `vlm.model.VisionLanguageModel` in evaluation mode.
        compile: decode steps, if the decoder runs lean.
    """
    decoder, embeddings = model.language_model.get_decoder(), model.get_input_embeddings()
    lean = lean_decoder(decoder)
    if lean is not None and _agrees(lean, decoder, embeddings):
        return (CompiledDecoder(lean), StaticSlotCache()) if compile else (lean, SlotCache())
    if compile:
        log.warning("%s is not of the Llama family: it runs uncompiled", type(decoder).__name__)
    own = SlotDecoder(decoder)
    if own is not None and _agrees(own, decoder, embeddings):
        return own, SlotCache()
    log.warning(
        "%s does not use transformers' attention interface: each of its answers is computed "
        "by itself and anew for every token, which is slow",
        type(decoder).__name__,
    )
    return Recompute(decoder), SlotCache()


def arrange(way: Decode, model: Any, copies: bool) -> None:
    """Rearrange the weights of a `vlm.model.VisionLanguageModel` for a way of its decoder.

    Args:
        way: of `choose`.
        model: the whole model.
        copies: for steps of several rows too, see `vlm.engine.packed`.
    """
    joined: list[nn.Module] = []
    lean = way.lean if isinstance(way, CompiledDecoder) else way
    if isinstance(lean, LeanDecoder):
        joined = lean.arrange(model.get_output_embeddings(), copies)
    if copies:
        pack_linears(model, joined)


class SlotDecoder:
    """The decoder's own class, with attention over the places of `vlm.engine.slots`."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def __call__(self, embeds: torch.Tensor, step: Step, cache: SlotCache) -> torch.Tensor:
        """(1, n, D) to (B, D)."""
        device = embeds.device
        with running(self._decoder.config, step, device):
            output = self._decoder(
                inputs_embeds=embeds,
                position_ids=torch.tensor([step.position_ids()], device=device),
                use_cache=True,
                **{CACHE_ARGUMENT: cache},
            )
        return output.last_hidden_state[0, torch.tensor(step.last_tokens(), device=device)]


class Recompute:
    """Any decoder: embeddings are kept instead of keys and values, and all is run again."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def __call__(self, embeds: torch.Tensor, step: Step, cache: SlotCache) -> torch.Tensor:
        """(1, n, D) to (B, D)."""
        kept = embeds[0][:, None]  # as keys of one head, n tokens
        count = len(step.lengths)
        rows = torch.arange(count, device=embeds.device)
        cache.start_layer(0, kept.transpose(0, 1)[None], kept[:, :, :1].transpose(0, 1)[None])
        store = cache.keys[0]
        if count:
            store[rows, :, torch.tensor(step.lengths, device=embeds.device)] = kept[:count]
        offset = count
        for s in step.segments:
            store[s.place, 0, s.start : s.start + s.length] = embeds[0, offset : offset + s.length]
            offset += s.length
        ends = [length + 1 for length in step.lengths]
        ends += [segment.start + segment.length for segment in step.segments]
        states = [
            self._decoder(inputs_embeds=store[place, :, :end], use_cache=False).last_hidden_state
            for place, end in enumerate(ends)
        ]
        return torch.cat([state[:, -1] for state in states])


def _agrees(way: Decode, decoder: Any, embeddings: nn.Module) -> bool:
    weight = embeddings.weight
    assert isinstance(weight, torch.Tensor)
    ids = torch.arange(8, device=weight.device) % len(weight)
    tokens = embeddings(ids)[None]
    cache = SlotCache()
    cache.reserve(1, 8)
    try:
        first = way(tokens[:, :4], Step([], [Segment(0, 0, 4)]), cache)
        cache.reserve(2, 8)
        second = way(tokens[:, 4:], Step([4], [Segment(1, 0, 3)]), cache)
        rows = tokens[0, torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 7, 7]], device=weight.device)]
        states = decoder(inputs_embeds=rows, use_cache=False).last_hidden_state
    except _FAILURES:
        return False
    expected = torch.stack([states[0, 3], states[0, 4], states[1, 2]])
    off = (torch.cat([first, second]) - expected).abs().max()
    allowed = _TOLERANCE.get(weight.dtype, _HALF_TOLERANCE)
    return bool(off <= allowed * expected.abs().max())
