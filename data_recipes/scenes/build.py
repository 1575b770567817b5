"""Write drawn scenes to disk: pictures and JSONL records."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from data_recipes.scenes.dialogues import TASKS, WITHOUT_PICTURE, questions
from data_recipes.scenes.draw import DEFAULT_SIDE, draw_scene
from data_recipes.scenes.world import MAX_OBJECTS, Scene, Split, draw_lots
from vlm.errors import ConfigError

_PICTURES_PER_FOLDER = 10_000
_SPLITS = ("train", "test", "heldout")


def make_scene(
    seed: int, index: int, *, max_objects: int = 4, split: Split = "train"
) -> tuple[Scene, random.Random]:
    """Scene ``index`` of a seed, and the source of lots for what is said about it."""
    rng = random.Random(f"{split}/{seed}/{index}")
    return draw_lots(rng, num_objects=rng.randint(1, max_objects), split=split), rng


def build(
    num: int,
    seed: int,
    out: Path,
    *,
    task: str = "instruct",
    turns: int = 6,
    max_objects: int = 4,
    side: int = DEFAULT_SIDE,
    close_up: bool = False,
    split: Split = "train",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write ``num`` records, and their pictures unless the task is one without.

    Args:
        num: number of scenes.
        seed: the same seed gives the same files, byte for byte.
        out: folder to write; ``out/records.jsonl`` appears last, so that a file that is
            there is complete.
        task: a key of `dialogues.TASKS`: what is said about a scene.
        turns: questions in a dialogue.
        max_objects: 1 to 6 objects stand in a scene, every number equally often.
        side: pixels, the side of a picture.
        close_up: cut out half of the side around one object.
        split: ``"test"`` scenes never coincide with ``"train"`` ones of the same seed.
        progress: called with the number of records written so far.

    Returns:
        The path of the records.

    Raises:
        ConfigError: a value out of range, or an unknown task.
    """
    _check(num, task, turns, max_objects, side, split)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "records.jsonl.part"
    with unfinished.open("w", encoding="utf-8") as file:
        for index in range(num):
            count = 1 if close_up else max_objects
            scene, rng = make_scene(seed, index, max_objects=count, split=split)
            record: dict[str, Any] = {"id": f"scene-{split}-{seed}-{index}"}
            picture = None if task in WITHOUT_PICTURE else draw_scene(scene, side)
            if picture is not None:
                picture = _close_up(picture, scene, rng) if close_up else picture
                record["images"] = [_save(picture, out, index)]
            record["messages"] = TASKS[task](scene, rng, turns)
            record["source"] = "scenes"
            if split != "train" and picture is not None:
                record["meta"] = {"questions": questions(scene, rng)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if progress is not None:
                progress(index + 1)
    records = out / "records.jsonl"
    unfinished.replace(records)
    return records


def _save(picture: Image.Image, out: Path, index: int) -> str:
    name = f"images/{index // _PICTURES_PER_FOLDER:03d}/{index:07d}.png"
    path = out / name
    if index % _PICTURES_PER_FOLDER == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, compress_level=1)
    return name


def _close_up(picture: Image.Image, scene: Scene, rng: random.Random) -> Image.Image:
    item, side = scene.objects[0], picture.width
    window, shift = side // 2, side // 16
    corner = []
    for step, offset in ((item.column, item.dx), (item.row, item.dy)):
        middle = ((step + 0.5) / 3 + offset) * side
        start = round(middle - window / 2) + rng.randint(-shift, shift)
        corner.append(min(max(start, 0), side - window))
    left, top = corner
    return picture.crop((left, top, left + window, top + window))


def _check(num: int, task: str, turns: int, max_objects: int, side: int, split: str) -> None:
    for name, value, low, high in _ranges(num, turns, max_objects, side):
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}; it must be from {low} to {high}")
    if task not in TASKS:
        raise ConfigError(f"no task {task!r} for scenes; the known ones are {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise ConfigError(f"no split {split!r}; the known ones are {', '.join(_SPLITS)}")


def _ranges(
    num: int, turns: int, max_objects: int, side: int
) -> Iterator[tuple[str, int, int, int]]:
    yield "num", num, 1, 10_000_000
    yield "turns", turns, 1, 32
    yield "max_objects", max_objects, 1, MAX_OBJECTS
    yield "side", side, 32, 2048
