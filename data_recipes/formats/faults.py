"""What a reader could not use, told by where it lies and why."""

from collections.abc import Callable
from dataclasses import dataclass

from vlm.errors import RecordError


@dataclass(frozen=True)
class Fault:
    """A row that no record was made of, or the place where a file ends too early.

    Attributes:
        where: file and line, row, entry or member.
        code: ``malformed``, ``unknown_shape``, ``encoding``, ``truncated``, ``image_mismatch``,
            ``path_escape`` (a path that leaves the data's folder), ``remote_url`` or
            ``unsafe_member`` (a link or device in an archive).
        reason: on one line, with the way out.
        line: its number, from 1, where the file has lines.
    """

    where: str
    code: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class FaultError(RecordError):
    """A `RecordError` with the code and line of a fault; whoever catches it tells `where`."""

    def __init__(self, reason: str, code: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.code, self.line = code, line

    def __reduce__(self) -> tuple[type["FaultError"], tuple[str, str, int | None]]:
        return type(self), (str(self), self.code, self.line)


Report = Callable[[Fault], None]


def refuse(fault: Fault) -> None:
    """What is done about a fault that nobody collects.

    Raises:
        RecordError: always.
    """
    raise RecordError(str(fault))
