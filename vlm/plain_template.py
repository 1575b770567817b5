"""LLaVA's template for alignment: the pictures, the caption, a line end, and no question.

"plain" in Liu et al. 2023 (``conv_llava_plain``, ``preprocess_plain``): what the user wrote is
dropped, and the loss counts on the caption and the line end behind it.
"""

from collections.abc import Sequence

from vlm.messages import ImagePart, Message
from vlm.template import Literal, Skeleton, Slot

SEPARATOR = "\n"


class PlainTemplate:
    """Renders skeletons as `vlm.template.ChatTemplate` does, of answers alone.

    Args:
        image_token: what is written for a picture.
    """

    def __init__(self, image_token: str) -> None:
        self.image_token = image_token

    def skeleton(self, messages: Sequence[Message], add_generation_prompt: bool) -> Skeleton:
        """The pieces in order; the texts of users and systems get no slot."""
        pieces: list[Literal | Slot] = []
        number = num_images = 0
        for message in messages:
            for part in message.content:
                if isinstance(part, ImagePart):
                    pieces.append(Literal(self.image_token))
                    num_images += 1
                elif part.text:
                    if message.role == "assistant":
                        pieces.append(Slot(number, True))
                    number += 1
            if message.role == "assistant":
                pieces.append(Literal(SEPARATOR, len(SEPARATOR)))
        return Skeleton(tuple(pieces), num_images)
