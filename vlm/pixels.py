"""Preprocessing: clean pictures to normalised pixels, pinned to the PIL backend.

transformers stores only "CLIPImageProcessor" and picks torchvision's version where that
is installed, which gives other pixels; here it is always the PIL one. Shapes: H and W
pixels; values are float32.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.image_processing_backends import PilBackend as ImageProcessor

from vlm.errors import CheckpointError
from vlm.resizing import resize_and_crop

# By the name that folders give them, whatever backend wrote it: DINOv2 uses BiT's,
# LLaVA's own is CLIP's with an optional padding to a square.
IMAGE_PROCESSORS: dict[str, type[ImageProcessor]] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
}

# How a file becomes samples. "exact": as by transformers' PIL processor. "box": only what the
# crop keeps is resized, at most a level off. "draft": JPEGs that are big enough are decoded at
# a half, a quarter or an eighth, then as "box"; other pictures are exact.
Preprocessing = Literal["exact", "box", "draft"]
DEFAULT_PREPROCESSING: Preprocessing = "draft"  # see benchmarks/preprocessing_captions.py


def load_image_processor(folder: Path, config: LlavaConfig) -> ImageProcessor:
    """The folder's preprocessing with the PIL backend, checked against the config.

    Raises:
        CheckpointError: absent, of another kind, or for another picture or patch size.
    """
    raw = _processor_config(folder)
    processor = read_image_processor(folder)
    size = config.vision_config.image_size
    height, width = output_size(processor)
    if (height, width) != (size, size):
        made = f"{height}x{width}" if height else "no fixed size"
        raise CheckpointError(
            f"{folder}: the processor makes pictures of {made} but the "
            f"vision tower takes {size}x{size}; correct crop_size"
        )
    for name, wanted in (
        ("patch_size", config.vision_config.patch_size),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy),
    ):
        if raw.get(name) not in (None, wanted):
            raise CheckpointError(
                f"{folder}: {name} is {raw[name]!r} for the processor but {wanted!r} in "
                "config.json; make them equal"
            )
    return processor


def read_image_processor(folder: Path) -> ImageProcessor:
    """The preprocessing of any folder that has one, a vision tower's alone included.

    Raises:
        CheckpointError: absent or of a kind that is not in `IMAGE_PROCESSORS`.
    """
    raw = _processor_config(folder)
    settings = raw.get("image_processor") or raw
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    name = str(kind).removesuffix("Fast").removesuffix("Pil")
    name = name.replace("FeatureExtractor", "ImageProcessor")  # before transformers 4.27
    if name not in IMAGE_PROCESSORS:
        raise CheckpointError(
            f"{folder}: unknown image_processor_type {kind!r}; known: {', '.join(IMAGE_PROCESSORS)}"
        )
    known = {k: v for k, v in settings.items() if not k.endswith("_type")}
    return IMAGE_PROCESSORS[name](**known)


def output_size(processor: ImageProcessor) -> tuple[int | None, int | None]:
    """Height and width that every picture leaves with; None where it depends on the picture."""
    crop = getattr(processor, "crop_size", None)
    settled = crop if crop and getattr(processor, "do_center_crop", False) else processor.size
    return settled.get("height"), settled.get("width")


def resize_output(processor: ImageProcessor, image_size: int) -> ImageProcessor:
    """The same preprocessing for squares of another size; the crop keeps its share."""
    settings = processor.to_dict()
    square = {"height": image_size, "width": image_size}
    shortest = (settings.get("size") or {}).get("shortest_edge")
    if shortest:
        before = output_size(processor)[0] or shortest
        settings["size"] = {"shortest_edge": round(shortest * image_size / before)}
        settings["crop_size"] = square
    else:
        settings["size"] = square
        if settings.get("crop_size"):
            settings["crop_size"] = square
    known = {k: v for k, v in settings.items() if not k.endswith("_type")}
    return type(processor)(**known)


def pad_to_square(processor: ImageProcessor) -> LlavaImageProcessorPil:
    """The same preprocessing of pictures that are first padded to a square, as LLaVA 1.5 does.

    The margins have the mean colour, so that they are zero once normalised (`expand2square`
    in the LLaVA repository's ``llava/mm_utils.py``).
    """
    known = {k: v for k, v in processor.to_dict().items() if not k.endswith("_type")}
    known["do_center_crop"] = bool(known.get("do_center_crop"))  # left out, it would mean True
    return LlavaImageProcessorPil(**{**known, "do_pad": True})


def _processor_config(folder: Path) -> dict[str, Any]:
    """processor_config.json, with preprocessor_config.json for what it lacks."""
    merged: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                merged.update(json.loads(path.read_text(encoding="utf-8")))
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: not a JSON object ({error})") from error
    if not merged:
        raise CheckpointError(
            f"{folder}: no processor_config.json or preprocessor_config.json; "
            "copy it from the vision tower's folder"
        )
    return merged


def level_table(processor: ImageProcessor) -> np.ndarray | None:
    """(3, 256) normalised value of each 8-bit level, or None where steps are switched off."""
    if not (processor.do_rescale and processor.do_normalize and output_size(processor)[0]):
        return None
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    scaled = processor.rescale(levels, processor.rescale_factor)
    normal = processor.normalize(scaled, processor.image_mean, processor.image_std)
    return np.asarray(normal[:, 0], dtype=np.float32)


def fit(
    processor: ImageProcessor, picture: Image.Image, *, exact: bool = True
) -> Image.Image | None:
    """The 8-bit picture that the processor would normalise; None to leave it to it.

    Resizing and cropping as the PIL backend does them, without its detours through arrays.

    Args:
        processor: says how.
        picture: clean 8-bit RGB.
        exact: bit for bit; otherwise a few samples may be one level off, see `vlm.resizing`.
    """
    height, width = output_size(processor)
    if getattr(processor, "do_pad", False):
        if not isinstance(processor, LlavaImageProcessorPil):
            return None
        picture = _squared(picture, tuple(int(x * 255) for x in processor.image_mean))
    size = _target(processor, picture) if processor.do_resize else picture.size
    if height is None or width is None or size[0] < width or size[1] < height:
        return None
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    crop = (left, top, left + width, top + height)
    return resize_and_crop(picture, size, crop, processor.resample, exact=exact)


def _target(processor: ImageProcessor, picture: Image.Image) -> tuple[int, int]:
    """Width and height after resizing."""
    shortest = processor.size.get("shortest_edge")
    if not shortest:
        return processor.size["width"], processor.size["height"]
    short, long = sorted(picture.size)
    other = int(shortest * long / short)
    return (shortest, other) if picture.width <= picture.height else (other, shortest)


def _squared(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    if picture.width == picture.height:
        return picture
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
