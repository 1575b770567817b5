r"""``conversations``: the LLaVA repository's files, and ShareGPT as LLaMA-Factory reads it.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "White and red."}]}

    {"conversations": [{"from": "human", "value": "<image><image>Which is larger?"}, ...],
     "images": ["a.jpg", "b.jpg"], "system": "Be brief."}

Sources: github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; github.com/hiyouga/
LLaMA-Factory, data/README.md.
"""

from collections.abc import Mapping
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.pictures import as_list
from data_recipes.formats.row import Row, place, role_of
from vlm.messages import Record

_LLAVA_KEYS = ("images", "system", "tools")


def is_llava(raw: Mapping[str, Any]) -> bool:
    """Turns have from and value, pictures are under ``image``."""
    turns = raw.get("conversations")
    return (
        isinstance(turns, list)
        and not any(key in raw for key in _LLAVA_KEYS)
        and all(isinstance(t, Mapping) and t.get("from") in ("human", "gpt") for t in turns)
    )


def is_sharegpt(raw: Mapping[str, Any]) -> bool:
    """The other files with ``conversations``."""
    return isinstance(raw.get("conversations"), list)


def convert(row: Row) -> Record:
    """One entry of either; a missing id is made, a number becomes text."""
    raw = row.raw
    if "image" in raw and "images" in raw:
        raise FaultError("both 'image' and 'images'; keep one", "malformed")
    images = row.pictures.all(as_list(raw.get("image", raw.get("images"))))
    turns = [_turn(turn, f"turn {i}") for i, turn in enumerate(raw["conversations"], 1)]
    if raw.get("system"):
        turns.insert(0, ("system", raw["system"]))
    return row.record(images, place(turns, images), ("conversations", "image", "images", "system"))


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise FaultError(f"{where} is a {type(turn).__name__}; give from and value", "malformed")
    keys = ("from", "value") if "from" in turn else ("role", "content")
    role, text = (turn.get(key) for key in keys)
    if not isinstance(text, str):
        seen = ", ".join(map(str, turn))
        raise FaultError(f"{where} has no text {keys[1]!r}, only {seen}", "malformed")
    return role_of(role, where), text
