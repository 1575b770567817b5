"""Rows of the hub, streamed, or of files in its layout: pictures come with them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_recipes.formats import Fault, read
from data_recipes.formats.tables import HUB
from data_recipes.recipe import Rows
from vlm.errors import ConfigError, RecordError
from vlm.messages import Record, nearest


def read_rows(
    rows: Rows,
    folder: Path | None,
    subsets: Sequence[str] = (),
    fetch: Callable[[str], bytes] | None = None,
) -> Iterator[Record | Fault]:
    """Records, and what none can be made of, in order; nothing is read ahead of them.

    Args:
        rows: which.
        folder: with the files; without it the hub is asked.
        subsets: only these; all by default.
        fetch: as of `data_recipes.formats.read`.

    Raises:
        ConfigError: the hub cannot be reached, there are no files, or no such subset.
    """
    if folder is None:
        yield from _of_hub(rows, subsets, fetch)
        return
    known = _folders(rows, folder)
    for name in subsets:
        if name not in known:
            raise ConfigError(f"{folder} has no subset {name!r}{nearest(name, known)}")
    for name in subsets or known:
        number = 0
        for path in known[name]:
            for each in _in_order(partial(read, path, fetch=fetch)):
                yield _named(each, rows, name, number)
                number += 1


def _of_hub(
    rows: Rows, subsets: Sequence[str], fetch: Callable[[str], bytes] | None
) -> Iterator[Record | Fault]:
    import datasets

    if rows.hub is None:
        raise ConfigError(f"{rows.title} comes from files: add --from-dir FOLDER with {rows.files}")
    way = (
        f"fetch it where there is a network, for example by `hf download {rows.hub} --repo-type "
        "dataset --include 'SUBSET/*' --local-dir FOLDER`, then add --from-dir FOLDER"
    )
    try:
        names = subsets or datasets.get_dataset_config_names(rows.hub)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{rows.hub} is not reached ({reason}); {way}") from error
    for name in names:
        place = f"{HUB}{rows.hub}/{name}"
        number = 0
        try:
            for each in _in_order(partial(read, place, split="train", fetch=fetch)):
                yield _named(each, rows, name, number)
                number += 1
        except RecordError as error:
            raise ConfigError(f"{error}; {number:,} rows were read; or {way}") from error


def _folders(rows: Rows, folder: Path) -> dict[str, list[Path]]:
    """Files by subset, which is the folder that they lie in; empty for the folder itself."""
    places = {"": folder, **{each.name: each for each in sorted(folder.glob("*/"))}}
    found = {name: sorted(place.glob(rows.files)) for name, place in places.items()}
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise ConfigError(f"{folder} has no {rows.files}, nor a folder with them; put them there")
    return found


def _named(each: Record | Fault, rows: Rows, subset: str, number: int) -> Record | Fault:
    """Rows of the hub have no ids: they get the subset and their number."""
    if isinstance(each, Fault):
        return each
    place = "/".join(filter(None, (rows.title, subset)))
    id = f"{subset or rows.title}-{number}" if rows.hub else each.id
    return replace(each, id=id, source=each.source or place)


def _in_order(start: Callable[..., Iterator[Record]]) -> Iterator[Record | Fault]:
    """Records, each behind the faults that were found before it."""
    waiting: list[Fault] = []
    for record in start(faults=waiting.append):
        yield from waiting
        waiting.clear()
        yield record
    yield from waiting
