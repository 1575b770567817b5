"""Through all records once, in batches: pictures in threads, turns and counts in order."""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_recipes.doctor.baseline import Baseline
from data_recipes.doctor.kinds import KINDS, Finding, image_kind
from data_recipes.doctor.pictures import Look, look, name_of, thumbnail
from data_recipes.doctor.seen import Seen
from data_recipes.doctor.summary import GALLERY, Shown, Summary
from data_recipes.doctor.texts import TextCheck
from vlm.messages import ImagePart, Record, TextPart

_BATCH = 256
_KEPT_LOOKS = 8192
_SHOWN_TEXT = 400


@dataclass(frozen=True)
class Options:
    """How thorough an examination is.

    Args:
        full: decode the pixels of every picture.
        sample: decode those of about this many otherwise, spread over all records: one
            more for every time that the records become e times as many.
        workers: threads that read and decode pictures.
        max_aspect: how many times longer than the other a side may be.
        seed: of the sample.
    """

    full: bool = False
    sample: int = 1000
    workers: int = 1
    max_aspect: float = 10.0
    seed: int = 0


class Examination:
    """One pass over records.

    Args:
        check: of the turns.
        options: how thorough.
        report: told of each finding, as it is found.
    """

    def __init__(
        self, check: TextCheck, options: Options, report: Callable[[Finding], None]
    ) -> None:
        self.summary = Summary()
        self._check, self._options, self._report = check, options, report
        self._seen = Seen()
        self._baseline = Baseline()
        self._looks: OrderedDict[str, Look] = OrderedDict()
        self._dice = random.Random(options.seed)

    def run(self, records: Iterable[Record]) -> Summary:
        """Examine all records."""
        iterator = iter(records)
        with ThreadPoolExecutor(self._options.workers) as pool:
            run = pool.map if self._options.workers > 1 else map
            while batch := list(islice(iterator, _BATCH)):
                for record, looks in zip(batch, self._look_at(batch, run), strict=True):
                    self._record(record, looks)
        self._seen.close()
        summary = self.summary
        summary.tokens, summary.characters = self._check.num_tokens, self._check.num_characters
        summary.scripts = self._check.scripts
        summary.forms, summary.baseline = self._baseline.forms(), self._baseline.share()
        return summary

    def unreadable(self, finding: Finding) -> None:
        """Count a line that no record could be made of."""
        self.summary.num_faulty += 1
        self._tell(finding, None)

    def _look_at(self, batch: list[Record], run: Any) -> list[list[Look]]:
        """Looks at the pictures of each record; a file that came lately is not read again."""
        tasks: dict[str | int, tuple[str | bytes, str, bool]] = {}
        keys: list[list[str | int]] = []
        for record in batch:
            keys.append([])
            for i, source in enumerate(record.images):
                key: str | int = source if isinstance(source, str) else len(tasks)
                keys[-1].append(key)
                if key in tasks or (isinstance(key, str) and key in self._looks):
                    continue
                tasks[key] = (source, name_of(source, record.id, i), self._wants_pixels())
        new = dict(zip(tasks, run(lambda task: look(*task), tasks.values()), strict=True))
        looks: dict[Any, Look] = {**self._looks, **new}
        found = [[looks[key] for key in row] for row in keys]
        self._looks.update((key, each) for key, each in new.items() if isinstance(key, str))
        while len(self._looks) > _KEPT_LOOKS:
            self._looks.popitem(last=False)
        for each in new.values():
            self.summary.num_decoded += each.signs is not None
            if each.header is not None:
                self.summary.formats[each.header.format] += 1
                self.summary.sizes[max(each.header.size).bit_length()] += 1
        return found

    def _wants_pixels(self) -> bool:
        """As a reservoir would take it: the n-th picture with the chance sample / n."""
        self.summary.num_pictures += 1
        chance = self._options.sample / self.summary.num_pictures
        return self._options.full or self._dice.random() < chance

    def _record(self, record: Record, looks: list[Look]) -> None:
        number = self.summary.num_records
        self.summary.num_records += 1
        self.summary.turns[sum(message.role == "user" for message in record.messages)] += 1
        found = [(code, reason, 0) for code, reason in self._check(record)]
        if before := self._seen.first("records", _digest(record), record.id):
            found.append(("duplicate_record", f"the same as record {before!r}", 0))
        else:
            self._baseline.add(record)
        for i, each in enumerate(looks):
            found += [(code, reason, i) for code, reason in self._picture(each)]
        for code, reason, index in found:
            self._tell(Finding(code, reason, record.id, number), record, index)
        self.summary.num_faulty += any(KINDS[code].is_fault for code, _, _ in found)

    def _picture(self, seen: Look) -> Iterator[tuple[str, str]]:
        if seen.error is not None or seen.header is None:
            code, reason = seen.error or ("", "")
            yield image_kind(code), reason
            return
        width, height = seen.header.size
        if max(width, height) > self._options.max_aspect * min(width, height):
            ratio = max(width, height) / min(width, height)
            yield "aspect", f"{seen.name} has {width:,} x {height:,} pixels, {ratio:.1f} to 1"
        if seen.header.orientation != 1:
            yield "rotated", f"{seen.name} has EXIF orientation {seen.header.orientation}"
        if seen.header.animated:
            yield "animated", f"{seen.name} has several frames"
        before = self._seen.first("pictures", seen.digest, seen.name)
        if before is not None:
            if before != seen.name:
                yield "duplicate_picture", f"{seen.name} has the same bytes as {before}"
        elif seen.signs is not None and (like := self._seen.near(seen.signs, seen.name)):
            yield "near_duplicate", f"{seen.name} looks like {like}"

    def _tell(self, finding: Finding, record: Record | None, index: int = 0) -> None:
        self.summary.findings[finding.code] += 1
        self._report(finding)
        shown = self.summary.gallery.setdefault(finding.code, [])
        if len(shown) < GALLERY:
            picture = record.images[index] if record and index < len(record.images) else None
            uri = thumbnail(picture) if picture is not None else None
            shown.append(Shown(finding, _turns(record) if record else "", uri))


def examine(
    records: Iterable[Record],
    check: TextCheck,
    options: Options | None = None,
    report: Callable[[Finding], None] = lambda _: None,
) -> Summary:
    """Examine records that are at hand; see `data_recipes.doctor.doctor` for files."""
    return Examination(check, options or Options(), report).run(records)


def _digest(record: Record) -> bytes:
    """Of pictures and turns; id, source and licence do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for source in record.images:
        digest.update(source if isinstance(source, bytes) else source.encode(errors="replace"))
        digest.update(b"\0image\0")
    for message in record.messages:
        parts = (part.text if isinstance(part, TextPart) else "\0" for part in message.content)
        digest.update(f"{message.role}\0{chr(1).join(parts)}\0".encode(errors="replace"))
    return digest.digest()


def _turns(record: Record) -> str:
    lines = [f"{message.role}: {_shown(message.content)}" for message in record.messages]
    text = "\n".join(lines)
    return text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + " ..."


def _shown(parts: Iterable[TextPart | ImagePart]) -> str:
    return "".join(p.text if isinstance(p, TextPart) else "[picture] " for p in parts)
