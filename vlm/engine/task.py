"""A request on its way through the engine."""

import numpy as np

from vlm.engine.features import Encoder
from vlm.engine.prefixes import token_keys
from vlm.engine.request import Completion, Request, Row
from vlm.processor import Processor


class Task(Row):
    """A request on its way through the engine.

    Attributes:
        tokens: a number for each prompt position, see `vlm.engine.prefixes`.
        length: positions in the cache.
        error: what ended it, for the thread that waits.
    """

    def __init__(self, request: Request, processor: Processor, encoder: Encoder) -> None:
        super().__init__(request, processor)
        pictures = [encoder.key(image) for image in request.prompt.images]
        self.tokens = token_keys(request.prompt.input_ids, processor.image_token_id, pictures)
        self.length = 0
        self.error: Exception | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt positions to be computed, at most."""
        return len(self.tokens)

    @property
    def reach(self) -> int:
        """The most positions that it may come to take."""
        return len(self.tokens) + self.limit

    @property
    def ended(self) -> bool:
        """Whether it needs no more steps."""
        return self.finish_reason is not None or self.error is not None

    def sequence(self) -> np.ndarray:
        """A number for each position in the cache: the prompt's, then the answer's."""
        return np.concatenate([self.tokens, np.array(self.ids, np.int64)])[: self.length]

    def abandon(self) -> None:
        """End it, if it runs: nobody waits for it any more."""
        self.finish_reason = self.finish_reason or "cancelled"

    def result(self) -> Completion:
        """The completion, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.completion()
