"""Items to results, in order: read ahead in threads, run side by side, errors as results."""

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm.answers import to_answer
from vlm.caption_items import Item
from vlm.caption_prompts import Caption, CaptionPrompts
from vlm.caption_reading import Find, Read, Reader, copied, failed, milliseconds
from vlm.captioning import CaptionResult
from vlm.engine.arrivals import ahead_of
from vlm.engine.in_order import in_order
from vlm.errors import ContextLengthError, GenerationError

if TYPE_CHECKING:
    from vlm.assistant import Assistant
    from vlm.engine.request import Completion, Request

_READERS = 4
_LONGEST = 8  # times batch_size: results held back by pictures that broke the model


def results(
    assistant: "Assistant",
    items: Iterable[Item],
    prompts: CaptionPrompts,
    batch_size: int,
    sampling: Mapping[str, Any],
    find: Find | None = None,
) -> Generator[CaptionResult]:
    """A result for each item, in their order, as soon as those before it are done.

    Args:
        assistant: does the work.
        items: walked in a thread, a few batches ahead; what it raises comes after the
            results of the items before.
        prompts: what is asked of each.
        batch_size: pictures that run together; one that ends makes room for the next.
        sampling: of `vlm.assistant.SamplingOptions`.
        find: an earlier result by `CaptionPrompts.same`; with it, pictures of the same
            bytes are captioned once and copied. Called from several threads.

    Raises:
        ContextLengthError: a prompt without variables is too long for the model.
        GenerationError: the model computes no answer for `batch_size` pictures in a row, or
            for any of them.
    """
    read = Reader(assistant, prompts, sampling, find)
    run = _Run(assistant, prompts, find)
    with (
        ahead_of(items, max(batch_size, 2), read, _READERS) as arriving,
        assistant.engine.desk(batch_size) as desk,
        closing(in_order(desk, arriving, run.admit, batch_size)) as made,
    ):
        found = (run.complete(*each) for each in made)
        yield from _unless_all_break(found, max(batch_size, 2))


class _Place:
    """An item between reading and its result.

    Attributes:
        result: as far as it is known.
        keys: of the prompts that run for it.
        same: see `Read`.
        source: another picture with the same bytes that comes before it.
    """

    def __init__(self, read: Read) -> None:
        self.result = read.result
        self.keys: Sequence[str] = tuple(read.requests)
        self.same = read.same
        self.source: _Place | None = None
        self._times = read.started, read.ended, time.monotonic()

    def finish(self, result: CaptionResult) -> CaptionResult:
        """The final result, with its own times."""
        started, ended, begun = self._times
        if started:  # not a file that changed
            result = dataclasses.replace(
                result,
                read_ms=self.result.read_ms,
                wait_ms=milliseconds(begun - ended),
                total_ms=milliseconds(time.monotonic() - started),
            )
        self.result = result
        return result


@dataclass(frozen=True)
class _Outcome:
    """A result, and what the model made of the picture if it ran."""

    result: CaptionResult
    answered: bool = False
    error: GenerationError | None = None


class _Run:
    """Says what runs and completes results; both in order, in one thread."""

    def __init__(self, assistant: "Assistant", prompts: CaptionPrompts, find: Find | None) -> None:
        self._assistant = assistant
        self._prompts = prompts
        self._find = find
        self._running: dict[bytes, _Place] = {}  # with `find`: pictures that may be copied

    def admit(self, read: Read) -> "tuple[_Place, Sequence[Request]]":
        """What to keep of an item, and what to run for it."""
        place = _Place(read)
        if not read.requests or self._find is None:
            return place, list(read.requests.values())
        place.source = self._running.get(read.same)
        known = self._find(read.same) if place.source is None else None
        if known is not None:  # captioned since it was read
            place.result = copied(read.result, known)
            place.keys = ()
        elif place.source is None:
            self._running[read.same] = place
            return place, list(read.requests.values())
        return place, ()

    def complete(self, place: _Place, outcomes: "Sequence[Completion | Exception]") -> _Outcome:
        """The result of an item.

        Raises:
            Exception: what concerns more than this picture.
        """
        if place.source is not None:  # it comes before, so it is complete
            return _Outcome(place.finish(copied(place.result, place.source.result)))
        if not outcomes:
            return _Outcome(place.finish(place.result))
        self._running.pop(place.same, None)
        error = next((each for each in outcomes if isinstance(each, Exception)), None)
        if isinstance(error, GenerationError):
            return _Outcome(place.finish(failed(place.result, error, "generation")), error=error)
        if isinstance(error, ContextLengthError) and self._prompts.variables:
            return _Outcome(place.finish(failed(place.result, error, "context_length")))
        if error is not None:
            raise error
        made = (self._caption(each) for each in outcomes if not isinstance(each, Exception))
        captions = dict(zip(place.keys, made, strict=True))
        first = captions[place.keys[0]]
        result = dataclasses.replace(
            place.result,
            caption=first.text,
            finish_reason=first.finish_reason,
            mean_logprob=first.mean_logprob,
            missing=first.missing,
            unwanted=first.unwanted,
            captions=captions if self._prompts.several else None,
        )
        return _Outcome(place.finish(result), answered=True)

    def _caption(self, completion: "Completion") -> Caption:
        answer = to_answer(completion, self._assistant.processor)
        logprob = answer.mean_logprob
        rounded = None if logprob is None else round(logprob, 6)
        return self._prompts.caption(answer.text, answer.finish_reason, rounded)


def _unless_all_break(found: Iterator[_Outcome], number: int) -> Iterator[CaptionResult]:
    """Results; those of pictures that broke the model only once it has answered another.

    Raises:
        GenerationError: `number` pictures in a row broke it, or all of two and more.
    """
    held: list[CaptionResult] = []
    errors: list[GenerationError] = []
    answered = False
    failure: Exception | None = None
    while failure is None and len(errors) < number:
        try:
            each = next(found)
        except StopIteration:
            break
        except Exception as error:  # raised after what came before it
            failure = error
            break
        if each.answered:
            answered = True
            errors.clear()
        elif each.error is not None:
            errors.append(each.error)
        held.append(each.result)
        if not errors or len(held) > _LONGEST * number:
            ready, held = held, []
            yield from ready
    if failure is None and (len(errors) >= number or (len(errors) > 1 and not answered)):
        raise errors[0]
    yield from held
    if failure is not None:
        raise failure
