"""What an examination counted."""

from collections import Counter
from dataclasses import dataclass, field

from data_recipes.doctor.baseline import Form
from data_recipes.doctor.kinds import KINDS, Finding

GALLERY = 12  # shown of each kind


@dataclass(frozen=True)
class Shown:
    """One finding of the gallery, with a thumbnail's ``data:`` URI where there is a picture."""

    finding: Finding
    text: str
    thumbnail: str | None


@dataclass
class Summary:
    """Counts over all records; its size does not grow with them.

    Attributes:
        num_records: that could be read.
        num_faulty: records, and lines that no record could be made of, with any fault.
        num_pictures: places where a record shows one.
        num_decoded: pictures whose pixels were decoded too.
        findings: how often each kind was found.
        gallery: the first `GALLERY` findings of each kind.
        tokens, characters: bit length of a record's length -> records; tokens with visual ones.
        sizes: bit length of a picture's longer side -> pictures.
        turns, scripts, formats: value -> how many.
        forms: of questions with short answers, the most frequent first.
        baseline: share of short answers that are right without looking; None without any.
    """

    num_records: int = 0
    num_faulty: int = 0
    num_pictures: int = 0
    num_decoded: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    gallery: dict[str, list[Shown]] = field(default_factory=dict)
    tokens: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    forms: list[Form] = field(default_factory=list)
    baseline: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.num_records:,} records, {self.num_pictures:,} pictures "
            f"({self.num_decoded:,} decoded), {self.num_faulty:,} records with faults"
        ]
        for code in KINDS:
            if num := self.findings[code]:
                note = "" if KINDS[code].is_fault else " (told only)"
                lines.append(f"{num:>9,}  {code}{note}: {KINDS[code].about}")
        if self.baseline is not None:
            lines.append(f"short answers guessed right without looking: {self.baseline:.1%}")
        return "\n".join(lines)
