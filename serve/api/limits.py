"""How much of everything one request, and all of them together, may take."""

from dataclasses import dataclass, field

from vlm.images import ImageLimits


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask for.

    Args:
        body_bytes: largest request.
        body_seconds: longest time that a request may take to arrive.
        images: of each picture.
        num_images: pictures in one request.
        num_messages: messages in one request.
        num_choices: answers to one request (`n`).
        requests: requests under way, from their first byte to their last; more are
            refused with 429.
        held_bytes: of all requests under way and their decoded pictures; more are
            refused with 503.
        answer_seconds: longest time from the queue to the last token.
        drain_seconds: how long answers may go on once the server is told to end.
    """

    body_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    images: ImageLimits = field(
        default_factory=lambda: ImageLimits(max_bytes=32 * 2**20, max_pixels=50_000_000)
    )
    num_images: int = 16
    num_messages: int = 1000
    num_choices: int = 8
    requests: int = 128
    held_bytes: int = 2 * 2**30
    answer_seconds: float = 600.0
    drain_seconds: float = 30.0


class Budget:
    """Bytes that all requests hold together; used by the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> bool:
        """Count `size` bytes more, if there is room for them."""
        if self.held + size > self.limit:
            return False
        self.held += size
        return True

    def give(self, size: int) -> None:
        """Count them no more."""
        self.held -= size
