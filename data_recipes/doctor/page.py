"""``doctor.html``: one page that needs no other file and no network."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from data_recipes.doctor.kinds import KINDS
from data_recipes.doctor.summary import Summary
from data_recipes.pages import template

_MAX_BARS = 14
_MAX_FORMS = 15


@dataclass(frozen=True)
class Bar:
    """One bar of a plot: what it counts, how many, and its length in percent of the longest."""

    label: str
    num: int
    length: float


@dataclass(frozen=True)
class Plot:
    """A histogram."""

    title: str
    bars: list[Bar]


def render(summary: Summary, title: str) -> str:
    """The page as text; everything that comes from data is escaped."""
    lengths = summary.tokens or summary.characters
    plots = [
        Plot("Tokens a record" if summary.tokens else "Characters a record", _powers(lengths)),
        Plot("Questions a record", _values(summary.turns)),
        Plot("Longer side of pictures, pixels", _powers(summary.sizes)),
        Plot("Formats of pictures", _most(summary.formats)),
        Plot("Scripts of the text", _most(summary.scripts)),
    ]
    return template("doctor/doctor.html").render(
        title=title,
        summary=summary,
        kinds={code: kind for code, kind in KINDS.items() if summary.findings[code]},
        absent=[kind.title for code, kind in KINDS.items() if not summary.findings[code]],
        plots=[plot for plot in plots if plot.bars],
        forms=summary.forms[:_MAX_FORMS],
    )


def _powers(lengths: Counter[int]) -> list[Bar]:
    """Bit lengths as ranges: 3 stands for 4 to 7."""
    if not lengths:
        return []
    every = range(min(lengths), max(lengths) + 1)
    return _bars({_range(bits): lengths[bits] for bits in every})


def _range(bits: int) -> str:
    low, high = (1 << bits) >> 1, (1 << bits) - 1
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _values(counts: Counter[int]) -> list[Bar]:
    """One bar a value; the last one takes the rest."""
    last = sorted(counts)[:_MAX_BARS]
    rest = {f"over {last[-1]}": sum(n for v, n in counts.items() if v > last[-1])} if last else {}
    shown = {str(value): counts[value] for value in last}
    return _bars(shown | {label: num for label, num in rest.items() if num})


def _most(counts: Counter[str]) -> list[Bar]:
    return _bars(dict(counts.most_common(_MAX_BARS)))


def _bars(counts: Mapping[str, int]) -> list[Bar]:
    most = max(counts.values(), default=1)
    return [Bar(label, num, round(100 * num / most, 2)) for label, num in counts.items()]
