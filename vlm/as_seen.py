"""What a model gets of a record, made readable again: tokens one by one, pictures as pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from vlm.images import ImageSource, load_image
from vlm.messages import Message

if TYPE_CHECKING:
    from vlm.processor import Processor

_HALF = "\ufffd"  # how a decoder shows a character whose last bytes are still to come
_MOST_BYTES = 4  # of a character in UTF-8


@dataclass(frozen=True)
class Piece:
    """A token, or several that are one character or one picture.

    Attributes:
        text: as the tokenizer decodes it, special tokens by their name.
        num_ids: how many tokens it is.
        learnt: whether the loss counts them.
        kind: of a picture the text is the image token's name, once.
    """

    text: str
    num_ids: int
    learnt: bool
    kind: Literal["text", "special", "picture"] = "text"


class AsSeen:
    """A processor's input, shown; `num_visual_tokens` and `context_length` are the processor's.

    Args:
        processor: the model's own; `Processor.plain()` for alignment by the plain template.
    """

    def __init__(self, processor: "Processor") -> None:
        self._processor, self._tokenizer = processor, processor.tokenizer
        self.num_visual_tokens = processor.num_visual_tokens
        self.context_length = processor.context_length
        added = processor.tokenizer.added_tokens_decoder
        self._special = {number: str(token) for number, token in added.items() if token.special}
        self._special[processor.image_token_id] = processor.image_token
        # Behind another token a piece keeps the space that it begins with.
        self._anchor = processor.tokenizer.encode("a", add_special_tokens=False)
        self._texts: dict[tuple[int, ...], str] = {}

    def encode_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of a conversation of any length; no picture is opened."""
        return self._processor.encode_ids(messages)

    def pieces(self, ids: Sequence[int], learnt: Sequence[bool]) -> list[Piece]:
        """Ids and their loss mask as pieces, in order; together they have all ids."""
        return list(self._pieces(ids, learnt))

    def _pieces(self, ids: Sequence[int], learnt: Sequence[bool]) -> Iterator[Piece]:
        at = 0
        while at < len(ids):
            size = 1
            kind: Literal["text", "special", "picture"] = "text"
            if ids[at] == self._processor.image_token_id:
                kind, size = "picture", min(self.num_visual_tokens, len(ids) - at)
                text = self._processor.image_token
            elif ids[at] in self._special:
                kind, text = "special", self._special[ids[at]]
            else:
                size = self._size(ids, learnt, at)
                text = self._text(ids[at : at + size])
            yield Piece(text, size, learnt[at], kind)
            at += size

    def _size(self, ids: Sequence[int], learnt: Sequence[bool], at: int) -> int:
        """Tokens up to the end of a character; of one that never ends, those shown as one sign."""
        if not self._text(ids[at : at + 1]).endswith(_HALF):
            return 1
        most = 0
        while most < min(_MOST_BYTES, len(ids) - at):
            number, flag = ids[at + most], learnt[at + most]
            if flag != learnt[at] or number in self._special:
                break
            most += 1
        texts = [self._text(ids[at : at + size]) for size in range(1, most + 1)]
        whole = (size for size, text in enumerate(texts, 1) if not text.endswith(_HALF))
        same = (size for size, text in enumerate(texts, 1) if len(text) == len(texts[0]))
        return next(whole, None) or max(same)

    def _text(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        if key not in self._texts:
            whole, before = self._decode([*self._anchor, *ids]), self._decode(self._anchor)
            self._texts[key] = whole.removeprefix(before)
        return self._texts[key]

    def _decode(self, ids: list[int]) -> str:
        decode = self._tokenizer.decode
        return str(decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def picture(self, source: ImageSource) -> Image.Image:
        """A picture as the vision tower gets it: resized, and cropped or padded.

        Raises:
            ImageError: it cannot be used.
        """
        image = load_image(source, draft_to=self._processor.draft_to)
        values = self._processor.pixel_values([image])[0].numpy().transpose(1, 2, 0)
        settings = self._processor.image_processor
        if settings.do_normalize:
            values = values * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
        levels = values / (settings.rescale_factor if settings.do_rescale else 1)
        return Image.fromarray(np.clip(np.round(levels), 0, 255).astype(np.uint8))
