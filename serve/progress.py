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
