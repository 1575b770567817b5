"""The decoder blocks of the Llama family in few operations: same numbers, less time a step.

transformers' own layers spend most of a small step between their operations, and compute
all of the last layer where only each row's last token is read. This runs the same modules'
weights in the order of Llama (Touvron et al. 2023), Mistral and Qwen 2 and 3 (with its
norms of queries and keys), and is used only where it reproduces the decoder's own output.

Shapes: n tokens a step, B rows, D width, H heads, G key-value heads, E head width.
"""

from typing import Any

import torch
from torch import nn

from vlm.engine.attention import attend, causal_mask, dot_product, stepping
from vlm.engine.blocks import Block, is_llama_layer, norm_of
from vlm.engine.packed import to_columns
from vlm.engine.rotary import RotaryTable
from vlm.engine.slots import SlotCache, Step


class LeanDecoder:
    """Runs steps like the decoder that it is made of.

    Args:
        decoder: of a supported structure, see `lean_decoder`.

    Attributes:
        blocks: its layers.
        final: the norm after the last layer.
        rotary: angles by position.
    """

    def __init__(self, decoder: Any) -> None:
        self.blocks = [Block(layer) for layer in decoder.layers]
        self.final = norm_of(decoder.norm)
        self.rotary = RotaryTable(decoder.rotary_emb)
        self._embeddings = decoder.get_input_embeddings()

    def arrange(self, head: nn.Module, copies: bool) -> list[nn.Module]:
        """Rearrange weights where the hardware gains by it, see `vlm.engine.packed`.

        Args:
            head: which reads the decoder's states.
            copies: pack them too, for steps of several rows.

        Returns:
            The linear layers of the decoder that are computed in another way.
        """
        joined = [each for block in self.blocks for each in block.join()]
        if head.weight is not self._embeddings.weight:
            to_columns(head)
        if copies:
            for each in joined:
                each.pack()
        return [layer for each in joined for layer in each.layers]

    def __call__(self, embeds: torch.Tensor, step: Step, cache: SlotCache) -> torch.Tensor:
        """Embeddings (1, n, D) to final states (B, D) of each row's last token."""
        run = step.only_run()
        if run is not None:
            return self._one_row(embeds[0], run.start, cache)
        positions, ends = step.position_ids(), step.last_tokens()
        states, device = embeds[0], embeds.device
        turn = self.rotary.at(positions, embeds)
        last = len(self.blocks) - 1
        with stepping(step, device):
            for i, block in enumerate(self.blocks):
                query, key, value = block.heads(states, turn)
                cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], i)
                if i < last:
                    states = block.close(states, _attend(block, query))
        # Of the last layer, only the last tokens are read: they attend like rows that run on.
        rows = torch.tensor(ends, device=device)
        with stepping(Step([positions[end] for end in ends], []), device, cache.layer(last)):
            mixed = _attend(block, query[rows])
        return self.final(block.close(states[rows], mixed))

    def _one_row(self, states: torch.Tensor, start: int, cache: SlotCache) -> torch.Tensor:
        """The next tokens (n, D) of a row that is alone: slices instead of indices."""
        number, last = len(states), len(self.blocks) - 1
        end = start + number
        turn = self.rotary.at(range(start, end), states)
        masks: dict[int | None, torch.Tensor | None] = {}
        for i, block in enumerate(self.blocks):
            query, key, value = block.heads(states, turn)
            keys, values = cache.write(i, start, key, value)
            if i == last:  # of the last layer, only the last token is read
                query, states, number = query[-1:], states[-1:], 1
            window = block.window
            first = max(0, end - window) if window and number == 1 else 0
            if number > 1 and (start or window) and window not in masks:
                masks[window] = causal_mask(start, number, window, query)
            mask = masks.get(window) if number > 1 else None
            seen = keys[:, :, first:end], values[:, :, first:end]
            mixed = dot_product(query.transpose(0, 1)[None], *seen, mask, block.scaling, None)
            states = block.close(states, mixed[0].transpose(0, 1).flatten(1))
        return self.final(states)


def lean_decoder(decoder: Any) -> LeanDecoder | None:
    """A lean form of the decoder, or None where its structure is another.

    Its numbers are to be tried, see `vlm.engine.decoders`.
    """
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(is_llama_layer(layer) for layer in layers):
        return None
    if not (hasattr(decoder, "rotary_emb") and hasattr(decoder, "norm")):
        return None
    windowed = getattr(decoder.config, "sliding_window", None) is not None
    if windowed and not all(hasattr(layer.self_attn, "sliding_window") for layer in layers):
        return None  # the window is given by the layer's caller: a short trial cannot tell
    return LeanDecoder(decoder)


def _attend(block: Block, query: torch.Tensor) -> torch.Tensor:
    """(n, H, E) to (n, H * E)."""
    nothing, module = query[:0], block.attention
    queries = query.transpose(0, 1)[None]
    return attend(module, queries, nothing, nothing, None, block.scaling)[0][0].flatten(1)
