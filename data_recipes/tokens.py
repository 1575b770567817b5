"""Records as tokens: what a model's processor is asked, whatever the model."""

from collections.abc import Sequence
from typing import Protocol

from vlm.errors import MessageError, RecordError
from vlm.messages import Message, Record


class TokenCounter(Protocol):
    """What is asked of a processor, such as `vlm.processor.Processor`."""

    num_visual_tokens: int
    context_length: int

    def encode_ids(self, messages: Sequence[Message], /) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a conversation; no picture is opened."""
        ...


def encode(processor: TokenCounter, record: Record) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of a record, visual tokens included; none of a record without turns.

    Raises:
        RecordError: the model's template does not take its turns.
    """
    if not record.messages:
        return [], []
    try:
        return processor.encode_ids(record.messages)
    except MessageError as error:
        raise RecordError(f"record {record.id!r}: {error}") from error
