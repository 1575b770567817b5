"""Where the model looked: attention from the tokens of an answer to the places of a picture.

Each token of an answer is drawn from the state of the position before it. How much that
position attends to each visual token, as a mean over heads and layers, is laid out as the
picture's patches lie. Attention tells what was read there, not why the answer is what it is
(Jain and Wallace 2019, arXiv:1902.10186): early tokens of a picture draw much of it whatever
is asked, so maps are best compared with each other.

Shapes: H heads, T positions, E head width, n tokens of the answer, (h, w) patches.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from vlm.engine.attention import attending, causal_mask, dot_product
from vlm.engine.runner import Engine
from vlm.errors import ConfigError, MessageError
from vlm.messages import Message, assistant, parse_messages

if TYPE_CHECKING:
    from vlm.assistant import Assistant

ATTENTION = "vlm_looking"
_current = threading.local()


@dataclass(frozen=True)
class Glance:
    """What one token of an answer was drawn from.

    Attributes:
        piece: the token's part of the answer.
        maps: for each picture (h, w), the share of all attention that each patch has.
    """

    piece: str
    maps: tuple[np.ndarray, ...]

    @property
    def share(self) -> float:
        """Of all attention, what goes to pictures."""
        return float(sum(each.sum() for each in self.maps))


def look(
    model: "Assistant",
    messages: Sequence[Message | Mapping[str, Any]],
    answer: str | None = None,
) -> list[Glance]:
    """One `Glance` for each token of an answer.

    Args:
        model: one of our LLaVAs.
        messages: the conversation, the question last.
        answer: that was given; by default the greedy one.

    Raises:
        ConfigError: the model is no LLaVA folder, keeps no grid of patches, or its decoder does
            not use transformers' attention interface.
        MessageError: there is no picture, or the answer is empty.
        ContextLengthError: question and answer do not fit.
    """
    engine = model.engine
    if not isinstance(engine, Engine):
        raise ConfigError(f"{model.name} is no LLaVA folder; its attention is not known")
    chat = parse_messages(messages)
    if not any(message.images for message in chat):
        raise MessageError("there is no picture to look at; attach one")
    if answer is None:
        answer = model.generate([chat])[0].text
    if not answer.strip():
        raise MessageError("the answer is empty; there is no word to look from")
    prompt, _ = engine.processor.encode_ids(chat, add_generation_prompt=True)
    whole = engine.processor.encode([*chat, assistant(answer)])
    said = [i for i in range(len(prompt), len(whole.input_ids)) if whole.loss_mask[i]]
    ids = [whole.input_ids[i] for i in said]
    with engine.lock:
        found = _attention(engine, whole.input_ids, whole.images, [i - 1 for i in said])
    grids = _grids(found, whole.input_ids, engine, len(whole.images))
    texts = ["", *(engine.processor.decode(ids[: n + 1]) for n in range(len(ids)))]
    glances = [
        Glance(text[len(before) :], grid)
        for before, text, grid in zip(texts, texts[1:], grids, strict=False)
    ]
    while glances and not glances[-1].piece:  # what ends the answer
        glances.pop()
    return glances


@torch.inference_mode()
def _attention(
    engine: Engine, ids: list[int], images: Sequence[Any], rows: list[int]
) -> np.ndarray:
    """(n, T): the mean of all heads and layers for some positions."""
    decoder = engine.model.language_model.get_decoder()
    features = engine.encoder.encode(images, [None] * len(images))
    embeds = engine.model.embed(torch.tensor([ids], device=engine.model.device), features)
    layers: list[torch.Tensor] = []
    with attending(decoder.config, ATTENTION), _noting(rows, layers):
        decoder(inputs_embeds=embeds, use_cache=False)
    if not layers:
        raise ConfigError(
            f"{type(decoder).__name__} does not use transformers' attention interface; where it "
            "looked is not known"
        )
    return torch.stack(layers).mean(dim=0).cpu().numpy()


@contextmanager
def _noting(rows: list[int], layers: list[torch.Tensor]) -> Iterator[None]:
    _current.rows, _current.layers = rows, layers
    try:
        yield
    finally:
        del _current.rows, _current.layers


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one sequence (1, H, T, E) to itself, some rows of which are noted."""
    length, rows = query.shape[2], torch.tensor(_current.rows, device=query.device)
    window = sliding_window or getattr(module, "sliding_window", None)
    mask = causal_mask(0, length, window, query)
    out = dot_product(query, key, value, mask, scaling, softcap)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    scores = query[0][:, rows] @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + mask[rows]).softmax(dim=-1, dtype=torch.float32)
    _current.layers.append(weights.mean(dim=0))
    return out.transpose(1, 2), None


def _grids(
    found: np.ndarray, ids: Sequence[int], engine: Engine, num: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """The shares of each picture's patches, for each row of (n, T)."""
    places = np.flatnonzero(np.array(ids) == engine.processor.image_token_id)
    size = engine.processor.num_visual_tokens
    side = math.isqrt(size)
    first = size - side * side  # a class token that is kept stands before the patches
    if first > 1:
        raise ConfigError(f"{size} visual tokens a picture are no square of patches")
    for row in found[:, places].reshape(len(found), num, size):
        yield tuple(each[first:].reshape(side, side) for each in row)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
