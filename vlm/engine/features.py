"""Pictures to visual tokens: each distinct picture is encoded once.

Shapes: N visual tokens a picture, D language width, H and W pixels.
"""

import hashlib
import json
from collections.abc import Sequence

import torch

from vlm.engine.cache import FeatureCache, FeatureKey
from vlm.engine.request import Request
from vlm.images import CleanImage
from vlm.model import VisionLanguageModel
from vlm.processor import Processor


def preprocessing_identity(processor: Processor) -> str:
    """A short hash of everything between a file and the tower's input."""
    settings = {**processor.image_processor.to_dict(), "preprocessing": processor.preprocessing}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Encoder:
    """Encodes pictures through a `FeatureCache`.

    Args:
        model: encodes what the cache lacks.
        processor: makes its pixels.
        weights: identity of the model's weights, part of every cache key.
        cache: may be shared with other encoders.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, weights: str, cache: FeatureCache
    ) -> None:
        self.cache = cache
        self._model = model
        self._processor = processor
        self._weights = weights
        self._preprocessing: dict[str, str] = {}

    def key(self, image: CleanImage) -> FeatureKey:
        """The picture's key in the cache."""
        way = self._processor.preprocessing  # which may be set anew
        preprocessing = self._preprocessing.get(way)
        if preprocessing is None:
            preprocessing = self._preprocessing[way] = preprocessing_identity(self._processor)
        return FeatureKey(image.sha256, preprocessing, self._weights)

    def encode(
        self, images: Sequence[CleanImage], pixels: Sequence[torch.Tensor | None]
    ) -> torch.Tensor | None:
        """Visual tokens of pictures, (pictures, N, D); None for no picture.

        Args:
            images: pictures, of which any may be the same.
            pixels: for each picture its values (3, H, W) if a caller has made them, or None.
        """
        if not images:
            return None
        keys = [self.key(image) for image in images]
        known: dict[FeatureKey, torch.Tensor] = {}
        lacking: dict[FeatureKey, torch.Tensor] = {}
        for key, image, made in zip(keys, images, pixels, strict=True):
            if key in known or key in lacking:
                continue
            features = self.cache.get(key)
            if features is not None:
                known[key] = features
            else:
                lacking[key] = self._processor.pixel_values([image])[0] if made is None else made
        if lacking:
            rows = self._model.encode_images(torch.stack(list(lacking.values())))
            for key, row in zip(lacking, rows, strict=True):
                known[key] = row
                self.cache.put(key, row)
        return torch.stack([known[key] for key in keys])

    def encode_rests(self, rests: Sequence[tuple[Request, int]]) -> torch.Tensor | None:
        """Visual tokens (tokens, D) of prompts, from a position on each; None for no picture.

        Args:
            rests: requests, and how many positions of their prompts are known already.
        """
        size = self._processor.num_visual_tokens
        images: list[CleanImage] = []
        pixels: list[torch.Tensor | None] = []
        keep: list[torch.Tensor] = []
        for request, known in rests:
            prompt, made = request.prompt, request.pixel_values
            before = prompt.input_ids[:known].count(self._processor.image_token_id)
            first, skipped = divmod(before, size)
            start, count = len(images) * size, len(prompt.images) - first
            keep.append(torch.arange(start + skipped, start + count * size))
            images += prompt.images[first:]
            pixels += [None] * count if made is None else list(made[first:])
        features = self.encode(images, pixels)
        if features is None:
            return None
        return features.flatten(0, 1)[torch.cat(keep).to(features.device)]
