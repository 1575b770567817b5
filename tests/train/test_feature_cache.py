"""Features of a frozen tower from the disk: the same step as from pixels, no decoding twice."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.collate import DialogueCollator
from train.dialogues import Dialogues
from train.feature_cache import DiskFeatures
from train.pictures import PictureReader
from train.settings import BatchConfig
from vlm import testing
from vlm.checkpoint import load_checkpoint
from vlm.errors import ConfigError, RecordError
from vlm.messages import Record, assistant, user


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Pictures 0, 1 and 0 again, and a text."""
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for seed, path in enumerate(paths):
        testing.draw_image(seed=seed).save(path)
    shown: list[tuple[str, ...]] = [(paths[0],), (paths[1],), (paths[0],), ()]
    return [
        Record(str(i), own, (user(f"what {i}?", *own), assistant("that")))
        for i, own in enumerate(shown)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_the_step_is_that_of_the_pixels(
    llava: str, tmp_path: Path, records: list[Record], packing: bool
) -> None:
    model, processor = load_checkpoint(llava)
    expected = model(**DialogueCollator(processor)(records)).loss.item()
    config = BatchConfig(packing=packing, feature_cache=str(tmp_path / "cache"))
    for known in ((), records[:1], records):  # nothing, one picture, all of it is on the disk
        dialogues = Dialogues(model, processor, config)
        for some in (known, records):
            if some:
                with dialogues.around(dialogues.collate(some)) as inputs:
                    assert "pixel_values" not in inputs and "known" not in inputs
                    loss = model(**inputs).loss.item()
        assert loss == pytest.approx(expected, rel=1e-6)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2
    assert dialogues.cache is not None
    assert sum(load_file(file)["features"].nbytes for file in files) == dialogues.cache.num_bytes(2)


def test_a_known_picture_is_not_decoded(llava: str, tmp_path: Path, records: list[Record]) -> None:
    model, processor = load_checkpoint(llava)
    cache = DiskFeatures(tmp_path / "cache", model, processor)
    source = str(records[0].images[0])
    first = PictureReader(processor, cache).open(source)
    assert first.image is not None and first.features is None
    features = model.look(processor.pixel_values([first.image]))[0]
    cache.put(first.key, features)
    again = PictureReader(processor, cache).open(source)
    assert again.image is None and again.features is not None
    torch.testing.assert_close(again.features, features.detach(), atol=0, rtol=0)
    assert again == first


def test_another_tower_or_preprocessing_has_a_folder_of_its_own(llava: str, tmp_path: Path) -> None:
    model, processor = load_checkpoint(llava)
    folders = {DiskFeatures(tmp_path, model, processor).folder}
    assert folders == {DiskFeatures(tmp_path, model, processor).folder}
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    folders.add(DiskFeatures(tmp_path, model, processor).folder)
    model.config.vision_feature_layer = -1
    folders.add(DiskFeatures(tmp_path, model, processor).folder)
    with torch.no_grad():
        next(model.vision_tower.parameters()).view(-1)[0] += 1
    folders.add(DiskFeatures(tmp_path, model, processor).folder)
    assert len(folders) == 4


def test_a_torn_file_is_made_anew(llava: str, tmp_path: Path, records: list[Record]) -> None:
    model, processor = load_checkpoint(llava)
    config = BatchConfig(feature_cache=str(tmp_path / "cache"))
    dialogues = Dialogues(model, processor, config)
    with dialogues.around(dialogues.collate(records)) as inputs:
        expected = model(**inputs).loss
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        os.truncate(file, 20)
    dialogues = Dialogues(model, processor, config)
    with dialogues.around(dialogues.collate(records)) as inputs:
        torch.testing.assert_close(model(**inputs).loss, expected)


def test_errors_say_what_to_do(llava: str, tmp_path: Path, records: list[Record]) -> None:
    model, processor = load_checkpoint(llava)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"feature_cache=.*file cannot be written .*another"):
        DiskFeatures(tmp_path / "file", model, processor)
    gone = Record("7", ("gone.png",), (user("what?", "gone.png"), assistant("that")))
    with pytest.raises(RecordError, match=r"record 7: .*gone\.png"):
        DialogueCollator(processor)([gone])
