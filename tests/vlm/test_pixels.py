"""Preprocessing: the pixels of transformers' PIL backend, whatever a folder calls it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

from vlm import testing
from vlm.errors import CheckpointError
from vlm.pixels import fit, level_table, load_image_processor

CONFIG = LlavaConfig(
    vision_config=testing.tiny_vision_config(), text_config=testing.tiny_text_config()
)
SIZE: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.2, 0.1]


def write(folder: Path, name: str = "preprocessor_config.json", **settings: Any) -> Path:
    settings = {"image_processor_type": "CLIPImageProcessor", **SIZE, **settings}
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ],
)
def test_every_known_name_gives_the_pil_backend(tmp_path: Path, kind: str) -> None:
    key = "feature_extractor_type" if kind == "CLIPFeatureExtractor" else "image_processor_type"
    settings = {**SIZE, key: kind, "image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = load_image_processor(tmp_path, CONFIG)
    assert type(found) is CLIPImageProcessorPil
    expected = CLIPImageProcessorPil(**SIZE, image_mean=MEAN, image_std=STD)
    for size in ((28, 28), (61, 40), (3, 90)):
        image = testing.draw_image(size, seed=size[0])
        ours, theirs = (p(image, return_tensors="np")["pixel_values"] for p in (found, expected))
        assert ours.shape == (1, 3, 28, 28)
        assert np.array_equal(ours, theirs)


def test_the_newer_file_wins_over_the_older(tmp_path: Path) -> None:
    write(tmp_path, image_mean=[0.0, 0.0, 0.0])
    nested = {"image_processor_type": "CLIPImageProcessor", **SIZE, "image_mean": MEAN}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert list(load_image_processor(tmp_path, CONFIG).image_mean) == MEAN
    write(tmp_path, "processor_config.json", image_mean=STD)
    assert list(load_image_processor(tmp_path, CONFIG).image_mean) == STD


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor'.*known: CLIP"),
        ({"image_processor_type": "SiglipImageProcessor"}, "no fixed size"),
        ({"image_processor_type": None}, "unknown image_processor_type None"),
        ({"crop_size": {"height": 28, "width": 30}}, "28x30 but the vision tower takes 28x28"),
        ({"crop_size": 56}, "56x56"),
        ({"crop_size": {"shortest_edge": 28}}, "crop_size"),
        ({"patch_size": 16}, "patch_size is 16"),
        ({"vision_feature_select_strategy": "full"}, "make them equal"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_image_processor(write(tmp_path, **settings), CONFIG)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"text"', "null"])
def test_a_file_that_is_no_json_object_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load_image_processor(tmp_path, CONFIG)


def test_a_folder_without_preprocessing_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="copy it from the vision tower"):
        load_image_processor(tmp_path, CONFIG)


# Levels


def test_the_table_holds_each_levels_value() -> None:
    processor = CLIPImageProcessorPil(**SIZE, image_mean=MEAN, image_std=STD)
    table = level_table(processor)
    assert table is not None and table.shape == (3, 256) and table.dtype == np.float32
    levels = np.arange(256, dtype=np.float64) / 255
    expected = np.stack([(levels - m) / s for m, s in zip(MEAN, STD, strict=True)])
    assert np.abs(table - expected).max() < 1e-5
    picture = testing.draw_image(seed=7)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    samples = np.asarray(picture).transpose(2, 0, 1)
    assert np.array_equal(np.stack([table[c][samples[c]] for c in range(3)]), theirs)


@pytest.mark.parametrize("settings", [{"do_rescale": False}, {"do_normalize": False}])
def test_no_table_where_values_are_not_normalised(settings: dict[str, Any]) -> None:
    assert level_table(CLIPImageProcessorPil(**{**SIZE, **settings})) is None
    assert level_table(CLIPImageProcessorPil(**{**SIZE, "do_center_crop": False})) is None


SQUARE = {"height": 28, "width": 28}
PROCESSORS = [
    CLIPImageProcessorPil(**SIZE),
    CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE),
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SQUARE),
    CLIPImageProcessorPil(size={"height": 28, "width": 32}, crop_size=SQUARE, resample=2),
    CLIPImageProcessorPil(**SIZE, do_resize=False),
    BitImageProcessorPil(size={"shortest_edge": 33}, crop_size=SQUARE),
    SiglipImageProcessorPil(size=SQUARE),
    LlavaImageProcessorPil(**SIZE, do_pad=True),
    LlavaImageProcessorPil(**SIZE, do_pad=False),
]


@pytest.mark.parametrize("number", range(len(PROCESSORS)))
@pytest.mark.parametrize(
    "size", [(28, 28), (60, 40), (41, 67), (28, 200), (301, 28), (30, 29), (640, 480), (27, 90)]
)
def test_fitted_and_looked_up_is_the_processors_own_value(
    number: int, size: tuple[int, int]
) -> None:
    processor = PROCESSORS[number]
    picture = testing.draw_image(size, seed=3)
    theirs = processor(picture, return_tensors="np")["pixel_values"][0]
    table, fitted = level_table(processor), fit(processor, picture)
    assert table is not None
    if fitted is None:  # smaller than the crop: left to the processor, which pads
        assert min(size) < 28 or number == 3
        return
    samples = np.asarray(fitted).transpose(2, 0, 1)
    assert np.array_equal(np.stack([table[c][samples[c]] for c in range(3)]), theirs)
