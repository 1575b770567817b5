"""``preview.html``: a sample of records, drawn in one pass."""

import os
import random
from collections.abc import Iterable
from pathlib import Path

from data_recipes.pages import template
from data_recipes.preview.cards import Eyes, card
from vlm.errors import ConfigError
from vlm.messages import Record


def preview(
    records: Iterable[Record],
    out: Path,
    eyes: Eyes,
    *,
    title: str,
    model: str,
    num: int = 64,
    seed: int = 0,
) -> None:
    """Write a page of records drawn at random.

    Args:
        records: read once, in memory that does not grow with their number.
        out: the file; it appears whole or not at all.
        eyes: the processor of the model that will be trained.
        title: what is shown.
        model: whose processor it is, for the page.
        num: how many records are drawn; all of fewer.
        seed: of the drawing.

    Raises:
        ConfigError: the file cannot be written.
        RecordError: the records cannot be read.
    """
    drawn, number = sample(records, num, seed)
    cards = [card(record, eyes) for record in drawn]
    text = template("preview/preview.html").render(
        title=title, model=model, cards=cards, num_records=number, eyes=eyes
    )
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error}); choose another file") from error


def sample(records: Iterable[Record], num: int, seed: int) -> tuple[list[Record], int]:
    """Some records in their order, each as likely as another, and the number of all.

    Algorithm R (Vitter 1985).
    """
    dice = random.Random(seed)
    drawn: list[tuple[int, Record]] = []
    number = 0
    for number, record in enumerate(records, start=1):
        if len(drawn) < num:
            drawn.append((number, record))
        elif (place := dice.randrange(number)) < num:
            drawn[place] = (number, record)
    return [record for _, record in sorted(drawn, key=lambda each: each[0])], number
