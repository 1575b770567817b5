"""Preprocessing: clean pictures to normalised pixels, pinned to the PIL backend.

transformers stores only "CLIPImageProcessor" and picks torchvision's version where that
is installed, which gives other pixels; here it is always the PIL one. Shapes: H and W
pixels; values are float32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPImageProcessorPil, LlavaConfig

from vlm.errors import CheckpointError

# Names that folders use for the one preprocessing we run, always with the PIL backend.
IMAGE_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)


def load_image_processor(folder: Path, config: LlavaConfig) -> CLIPImageProcessorPil:
    """The folder's preprocessing with the PIL backend, checked against the config.

    Raises:
        CheckpointError: absent, of another kind, or for another picture or patch size.
    """
    raw = _processor_config(folder)
    settings = raw.get("image_processor") or raw
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if kind not in IMAGE_PROCESSORS:
        raise CheckpointError(
            f"{folder}: unknown image_processor_type {kind!r}; known: {', '.join(IMAGE_PROCESSORS)}"
        )
    known = {k: v for k, v in settings.items() if not k.endswith("_type")}
    processor = CLIPImageProcessorPil(**known)
    size = config.vision_config.image_size
    crop = processor.crop_size
    if (crop["height"], crop["width"]) != (size, size):
        raise CheckpointError(
            f"{folder}: the processor makes pictures of {crop['height']}x{crop['width']} but the "
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


def level_table(processor: CLIPImageProcessorPil) -> np.ndarray | None:
    """(3, 256) normalised value of each 8-bit level, or None where steps are switched off."""
    steps = (processor.do_rescale, processor.do_normalize, processor.do_center_crop)
    shortest = processor.size.get("shortest_edge")
    crop = processor.crop_size["height"]
    whole = shortest == crop or (
        processor.size.get("height") == processor.size.get("width") == crop
    )
    if not all(steps) or (processor.do_resize and not whole):
        return None
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    scaled = processor.rescale(levels, processor.rescale_factor)
    normal = processor.normalize(scaled, processor.image_mean, processor.image_std)
    return np.asarray(normal[:, 0], dtype=np.float32)
