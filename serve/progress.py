"""Progress bars on standard error, and only where a person watches it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counting(verb: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar for `total` things; the value sets how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def captioning(total: int | None) -> Iterator[Callable[[int, int, int], None]]:
    """A bar with pictures a second, errors and the time left; takes how many are done,
    how many failed, and how many this run has written.

    The pace is this run's: pictures that were done before do not count.
    """
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True)
    columns = (
        *(TextColumn("captioning"), BarColumn(), MofNCompleteColumn()),
        TextColumn("{task.fields[pace]:.1f} images/s"),
        TextColumn("{task.fields[failed]:,} errors"),
        Remaining(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("captioning", total=total, pace=0.0, failed=0)
        first: list[tuple[float, int]] = []

        def reached(done: int, failed: int, written: int) -> None:
            now = time.monotonic()
            if written == 0 or not first:
                first[:] = [(now, written)]
            (began, before) = first[0]
            pace = (written - before) / (now - began) if now > began else 0.0
            bar.update(task, completed=done, pace=pace, failed=failed)

        yield reached
