"""One record as a card: its pictures as the model gets them, its turns, its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from PIL import Image

from data_recipes.pages import data_uri
from data_recipes.tokens import TokenCounter
from vlm.as_seen import Piece
from vlm.errors import ImageError, MessageError
from vlm.messages import Record, TextPart

_MOST_PIECES = 1500  # tokens that one card shows
_QUALITY = 80


class Eyes(TokenCounter, Protocol):
    """What is asked of a model's processor, such as `vlm.as_seen.AsSeen`."""

    def pieces(self, ids: Sequence[int], learnt: Sequence[bool], /) -> list[Piece]:
        """Ids and their loss mask as readable pieces."""
        ...

    def picture(self, source: str | bytes, /) -> Image.Image:
        """A picture as the vision tower gets it; ImageError if it cannot be used."""
        ...


@dataclass(frozen=True)
class Shown:
    """A picture: a ``data:`` URI, or why there is none."""

    name: str
    uri: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Card:
    """A record to be shown.

    Attributes:
        id, source, license: of the record.
        pictures: in order.
        turns: role, and texts in which a number stands for a picture.
        pieces: tokens, at most `_MOST_PIECES`.
        num_hidden: tokens that are not shown, and how many of them are learnt.
        num_tokens, num_visual, num_learnt: of the whole record.
        too_long: whether the model has fewer positions.
        error: why there are no tokens.
    """

    id: str
    source: str
    license: str
    pictures: list[Shown]
    turns: list[tuple[str, list[str | int]]]
    pieces: list[Piece]
    num_hidden: tuple[int, int] = (0, 0)
    num_tokens: int = 0
    num_visual: int = 0
    num_learnt: int = 0
    too_long: bool = False
    error: str | None = None


def card(record: Record, eyes: Eyes) -> Card:
    """What is shown of a record; a picture that cannot be used is told in its place."""
    pictures = [_shown(source, number, eyes) for number, source in enumerate(record.images, 1)]
    ids, learnt, error = _encoded(record, eyes)
    pieces = eyes.pieces(ids, learnt)
    rest = pieces[_MOST_PIECES:]
    hidden = sum(each.num_ids for each in rest), sum(each.num_ids for each in rest if each.learnt)
    return Card(
        id=record.id,
        source=record.source or "",
        license=record.license or "",
        pictures=pictures,
        turns=_turns(record),
        pieces=pieces[:_MOST_PIECES],
        num_hidden=hidden,
        num_tokens=len(ids),
        num_visual=sum(each.num_ids for each in pieces if each.kind == "picture"),
        num_learnt=sum(learnt),
        too_long=len(ids) > eyes.context_length,
        error=error,
    )


def _encoded(record: Record, eyes: Eyes) -> tuple[list[int], list[bool], str | None]:
    if not record.messages:
        return [], [], "there are no turns"
    try:
        return (*eyes.encode_ids(record.messages), None)
    except MessageError as error:
        return [], [], str(error)


def _shown(source: str | bytes, number: int, eyes: Eyes) -> Shown:
    name = PurePath(source).name if isinstance(source, str) else f"picture {number}"
    try:
        return Shown(name, data_uri(eyes.picture(source), _QUALITY))
    except ImageError as error:
        return Shown(name, error=str(error))


def _turns(record: Record) -> list[tuple[str, list[str | int]]]:
    turns: list[tuple[str, list[str | int]]] = []
    number = 0
    for message in record.messages:
        parts: list[str | int] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                number += 1
                parts.append(number)
        turns.append((message.role, parts))
    return turns
