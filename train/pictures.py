"""Pictures of records, on their way to a batch: pixels, or what the disk knows of them.

They are opened in loader workers, each once for records that stand near each other.
Shapes: H and W pixels, N visual tokens, Dv tower width.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from train.feature_cache import DiskFeatures
from vlm.image_bytes import read_path
from vlm.images import DEFAULT_LIMITS, CleanImage, ImageSource, load_image
from vlm.model import VisionLanguageModel
from vlm.processor import Processor

_OPEN = 32  # pictures kept for the next records


@dataclass(frozen=True)
class Picture:
    """A picture of a record; two are equal if they look alike.

    Attributes:
        key: hash of its file's bytes, or of its pixels if it came without a file.
        image: its pixels; None if its features are known.
        features: (N, Dv), if they are known.
    """

    key: str
    image: CleanImage | None = field(compare=False)
    features: Tensor | None = field(default=None, compare=False)


class PictureReader:
    """Opens pictures and makes them a part of a batch.

    Args:
        processor: makes pixels.
        cache: with it, pictures whose features are known are not decoded.
    """

    def __init__(self, processor: Processor, cache: DiskFeatures | None = None) -> None:
        self._processor = processor
        self._cache = cache
        self._read = functools.lru_cache(_OPEN)(self._read_path)

    def __getstate__(self) -> tuple[Processor, DiskFeatures | None]:
        return self._processor, self._cache

    def __setstate__(self, state: tuple[Processor, DiskFeatures | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def open(self, source: ImageSource) -> Picture:
        """One picture.

        Raises:
            ImageError: it cannot be used.
        """
        if isinstance(source, str):
            return self._read(source)
        image = load_image(source, draft_to=self._processor.draft_to)
        return self._picture(image.sha256, image)

    def _read_path(self, path: str) -> Picture:
        data = read_path(path, DEFAULT_LIMITS.max_bytes)
        key = hashlib.sha256(data).hexdigest()
        features = None if self._cache is None else self._cache.get(key)
        if features is not None:
            return Picture(key, None, features)
        return Picture(key, load_image(data, draft_to=self._processor.draft_to, name=path))

    def _picture(self, key: str, image: CleanImage) -> Picture:
        features = None if self._cache is None else self._cache.get(key)
        return Picture(key, image if features is None else None, features)

    def tensors(self, pictures: Sequence[object]) -> dict[str, Tensor]:
        """What a batch says of its pictures.

        Returns:
            pixel_values (pictures, 3, H, W). With a cache: pixel_values of those that it
            lacks, vision_features (known, N, Dv) of the others, known (pictures,), and
            picture_keys (pictures, 32), see `complete`. Nothing for no picture.
        """
        if not pictures:
            return {}
        shown = [cast(Picture, picture) for picture in pictures]
        images = [picture.image for picture in shown if picture.image is not None]
        batch = {"pixel_values": self._processor.pixel_values(images)}
        if self._cache is None:
            return batch
        known = [picture.features for picture in shown if picture.features is not None]
        if known:
            batch["vision_features"] = torch.stack(known)
        batch["known"] = torch.tensor([picture.features is not None for picture in shown])
        keys = b"".join(bytes.fromhex(picture.key) for picture in shown)
        batch["picture_keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 32)
        return batch


@torch.no_grad()
def complete(
    batch: dict[str, Tensor], model: VisionLanguageModel, cache: DiskFeatures
) -> dict[str, Tensor]:
    """The batch with the tower's features of all its pictures; new ones go to the disk.

    Args:
        batch: of `PictureReader.tensors`, with a cache.
        model: whose tower is frozen.
        cache: to write.
    """
    rest = dict(batch)
    if "known" not in rest:  # no picture
        return rest
    known, keys = rest.pop("known").bool(), rest.pop("picture_keys").cpu()
    pixels, found = rest.pop("pixel_values"), rest.pop("vision_features", None)
    parts = [] if found is None else [found.to(model.vision_tower.device)]
    if len(pixels):
        new = model.look(pixels)
        for key, features in zip(keys[~known.cpu()], new, strict=True):
            cache.put(bytes(key.tolist()).hex(), features)
        parts.append(new)
    order = torch.cat([known.nonzero(), (~known).nonzero()]).flatten()
    rest["vision_features"] = torch.cat(parts)[order.argsort()]
    return rest
