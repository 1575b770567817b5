"""``images`` and ``texts``: The Cauldron and FineVision.

    {"images": [...], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "VQA"}]}

Sources: huggingface.co/datasets/HuggingFaceM4/the_cauldron and .../FineVision.
"""

from collections.abc import Mapping
from typing import Any

from data_recipes.formats.faults import FaultError
from data_recipes.formats.pictures import as_list
from data_recipes.formats.row import Row
from vlm.messages import ImagePart, Message, Record, TextPart

_KEYS = ("user", "assistant")


def is_cauldron(raw: Mapping[str, Any]) -> bool:
    """Turns are pairs."""
    texts = raw.get("texts")
    return isinstance(texts, list) and all(
        isinstance(each, Mapping) and set(_KEYS) <= set(each) for each in texts
    )


def convert(row: Row) -> Record:
    """All pictures stand before the first question; sources and ratings are kept."""
    images = row.pictures.all(as_list(row.raw.get("images")))
    messages: list[Message] = []
    rest = []
    for pair in row.raw["texts"]:
        texts = [pair[key] for key in _KEYS]
        if not all(isinstance(text, str) for text in texts):
            raise FaultError("a turn of texts is not text", "malformed")
        first = () if messages else tuple(ImagePart(image) for image in images)
        messages.append(Message("user", (*first, TextPart(texts[0]))))
        messages.append(Message("assistant", (TextPart(texts[1]),)))
        rest.append({key: value for key, value in pair.items() if key not in _KEYS and value})
    if not any(rest):
        return row.record(images, messages, ("images", "texts"))
    raw = {**row.raw, "texts": rest}
    return Row(raw, row.id, row.pictures).record(images, messages, ("images",))
