"""The optional ``about.json`` of a model folder: what to tell people about the model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError
from vlm.json_file import read_object

CAPTION_PROMPT = "describe the picture."
KNOWS = "What it knows depends on the data that it was trained on; it can be wrong."


@dataclass(frozen=True)
class About:
    """What to show of a model.

    Args:
        name: a short name.
        knows: one honest line on what it can answer.
        caption_prompt: the question that its captions answer best.
        examples: pairs of a picture file and a question to try on it.
    """

    name: str
    knows: str = KNOWS
    caption_prompt: str = CAPTION_PROMPT
    examples: tuple[tuple[Path, str], ...] = ()


def read_about(folder: Path, name: str) -> About:
    """The folder's ``about.json``; without one, a generic text under `name`.

    The file holds ``{"name", "knows", "caption_prompt", "examples": [{"image", "question"}]}``,
    each key optional, pictures relative to the folder.

    Raises:
        CheckpointError: the file is malformed.
    """
    path = folder / "about.json"
    raw = read_object(path)
    if raw is None:
        return About(name)
    texts = {"name": name, "knows": KNOWS, "caption_prompt": CAPTION_PROMPT}
    for key in texts:
        texts[key] = raw.get(key, texts[key])
        if not isinstance(texts[key], str) or not texts[key].strip():
            raise CheckpointError(f"{path}: {key} must be a text; correct or remove it")
    listed = raw.get("examples", [])
    if not isinstance(listed, list):
        raise CheckpointError(f"{path}: examples must be a list; correct or remove it")
    examples = tuple(_example(entry, path) for entry in listed)
    return About(texts["name"], texts["knows"], texts["caption_prompt"], examples)


def _example(entry: Any, path: Path) -> tuple[Path, str]:
    if isinstance(entry, Mapping):
        image, question = entry.get("image"), entry.get("question")
        if isinstance(image, str) and isinstance(question, str):
            if os.path.isabs(image) or ".." in Path(image).parts:  # not ours to put on show
                raise CheckpointError(f"{path}: example {image!r} must lie inside the folder")
            return path.parent / image, question
    raise CheckpointError(
        f'{path}: an example must be {{"image": FILE, "question": TEXT}}; correct or remove it'
    )
