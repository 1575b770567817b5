"""Batches of prompts through the model: prefill, then one token a row and step.

Shapes: B rows still running, T prompt positions, S positions in the KV cache, V vocabulary.
"""

import dataclasses
import uuid
from collections.abc import Iterator, Sequence

import torch
from transformers.cache_utils import Cache, DynamicCache

from vlm.engine.cache import FeatureCache
from vlm.engine.features import Encoder
from vlm.engine.request import Completion, Request, Row
from vlm.engine.sampling import next_tokens
from vlm.engine.turns import TurnLock
from vlm.model import VisionLanguageModel
from vlm.processor import Processor


class Engine:
    """Owns a model at run time; all its methods may be called from several threads.

    The model is locked for one step at a time and in the order of asking, so parallel
    streams advance in turn and each keeps its own KV cache.

    Args:
        model: in evaluation mode; its weights must not change while the engine lives.
        processor: of the same folder.
        identity: of the weights, for cache keys; by default unique to this engine.
        cache: for visual tokens; by default a new one of 256 MiB.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        identity: str | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.cache = FeatureCache() if cache is None else cache
        self.identity = identity or uuid.uuid4().hex[:16]
        self.encoder = Encoder(model, processor, self.identity, self.cache)
        self.lock = TurnLock()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests as one batch; results in the order of the requests.

        Raises:
            ContextLengthError: a prompt does not fit; nothing is computed then.
            GenerationError: the model computes NaN.
        """
        batch = Batch(self, requests)
        while batch.step():
            pass
        return [row.completion() for row in batch.rows]

    def stream(self, request: Request) -> Iterator[Row]:
        """Answer one request; yields its row after every step, the last time ended.

        Raises:
            ContextLengthError: the prompt does not fit; raised here, before the first step.
            GenerationError: the model computes NaN; raised by a step.
        """
        return _steps(Batch(self, [request]))


def _steps(batch: "Batch") -> Iterator[Row]:
    running = True
    while running:
        running = batch.step()
        yield batch.rows[0]


class Batch:
    """Requests that run together. A row that ends leaves, so later steps cost less.

    Args:
        engine: whose model runs them.
        requests: in the order of `rows`; the batch is not extended later.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        processor = engine.processor
        self.rows = [Row(r, processor.eos_token_ids, processor.context_length) for r in requests]
        self._engine = engine
        self._active = list(self.rows)
        self._cache: Cache | None = None
        self._mask: torch.Tensor | None = None  # (B, S) where rows are padded, else None

    @torch.inference_mode()
    def step(self) -> bool:
        """One token for every running row; False when none is left running.

        Cancelled rows leave first, so a set stop event is obeyed before any computation.
        """
        with self._engine.lock:
            for row in self._active:
                row.cancel_if_asked()
            self._drop_ended()
            if not self._active:
                return False
            logits = self._prefill() if self._cache is None else self._decode(self._cache)
            tokens = next_tokens(logits, [row.sampler for row in self._active])
            for row, token in zip(self._active, tokens, strict=True):
                row.take(token)
            self._drop_ended()
            return bool(self._active)

    def _prefill(self) -> torch.Tensor:
        """Run all prompts, padded on the left; logits (B, V) of the last position."""
        model = self._engine.model
        prompts = [row.request.prompt for row in self._active]
        bare = [dataclasses.replace(prompt, images=[]) for prompt in prompts]
        batch = self._engine.processor.collate(bare, padding_side="left")
        mask = batch["attention_mask"].to(model.device)
        self._mask = None if bool(mask.all()) else mask
        output = model(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=self._mask,
            image_features=self._features(),
            past_key_values=DynamicCache(config=model.config.text_config),
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return self._last(output.logits)

    def _features(self) -> torch.Tensor | None:
        requests = [row.request for row in self._active]
        pixels: list[torch.Tensor | None] = []
        for request in requests:
            made = request.pixel_values
            pixels += [None] * len(request.prompt.images) if made is None else list(made)
        return self._engine.encoder.encode(
            [image for request in requests for image in request.prompt.images], pixels
        )

    def _decode(self, cache: Cache) -> torch.Tensor:
        """Run the newest token of each row; logits (B, V)."""
        model = self._engine.model
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        newest = torch.tensor([[row.ids[-1]] for row in self._active], device=model.device)
        output = model(
            input_ids=newest,
            attention_mask=self._mask,
            past_key_values=cache,
            logits_to_keep=1,
        )
        return self._last(output.logits)

    def _last(self, logits: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, V) of the last position; the image token, which is no text, is ruled out."""
        assert logits is not None
        last = logits[:, -1]
        last[:, self._engine.processor.image_token_id] = -torch.inf
        return last

    def _drop_ended(self) -> None:
        """Take ended rows out of the batch and out of the KV cache.

        The cache grows by copying at every step anyway, so one more copy is cheap.
        """
        kept = [i for i, row in enumerate(self._active) if row.finish_reason is None]
        if len(kept) == len(self._active):
            return
        self._active = [self._active[i] for i in kept]
        if not kept:
            self._cache = self._mask = None
        elif self._cache is not None:
            index = torch.tensor(kept, device=self._engine.model.device)
            self._cache.batch_select_indices(index)
            if self._mask is not None:
                mask = self._mask[index]
                self._mask = None if bool(mask.all()) else mask
