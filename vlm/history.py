"""The runs that made a model: a record that grows, and travels with the weights.

Every entry is a JSON object with a ``stage``: what `train` writes of a run, and two of
our own, ``compose`` and ``download``. It lies in the folder's ``vlm.json``, see
`vlm.manifest`. No import of torch.
"""

import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlm import __version__
from vlm.errors import CheckpointError
from vlm.json_file import read_object

FILE = "vlm.json"
Run = Mapping[str, Any]
History = tuple[Run, ...]
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "accelerate", "pillow")


def read_history(folder: Path, unknown: History = ()) -> History:
    """The runs behind the weights of a folder.

    A folder of the hub's cache adds where it was downloaded from, and which revision.

    Args:
        folder: of a model, an adapter or a part.
        unknown: what to take where nobody wrote them down.

    Raises:
        CheckpointError: vlm.json is malformed.
    """
    raw = read_file(folder)
    try:
        runs = unknown if raw is None else history_in(raw)
    except TypeError as error:
        raise CheckpointError(f"{folder / FILE}: {error}; correct or remove it") from error
    return (*runs, *_download(folder))


def history_in(raw: Mapping[str, Any]) -> History:
    """The runs in what vlm.json holds; raises TypeError where they are malformed."""
    runs = raw.get("training")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise TypeError("training must be a list of objects")
    return tuple(runs)


def composed(vision: Path, language: Path, projector: str) -> History:
    """The runs behind two parts, and their joining.

    Args:
        vision: folder that the tower was taken from.
        language: folder that the language model was taken from.
        projector: the new one's kind.

    Raises:
        CheckpointError: a vlm.json is malformed.
    """
    runs: list[Run] = []
    bases: list[str] = []
    for folder in (vision, language):
        before = read_history(folder)
        runs += (run for run in before if run not in runs)
        bases += (name for name in base_models(before) if name not in bases)
    parts = {"vision": _label(vision), "language": _label(language), "projector": projector}
    return (*runs, {"stage": "compose", **parts, "base_models": bases, **stamp()})


def base_models(history: Iterable[Run]) -> tuple[str, ...]:
    """The models of a hub that the weights come from, the nearest ones only."""
    named = [run["base_models"] for run in history if "base_models" in run]
    return tuple(map(str, named[-1])) if named else ()


def stamp() -> dict[str, Any]:
    """When, and by which versions."""
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries that decide what weights are."""
    found = {"python": platform.python_version(), "vlm": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_file(folder: Path) -> dict[str, Any] | None:
    """What the folder's vlm.json holds; None without one.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return read_object(folder / FILE)


def _download(folder: Path) -> History:
    """An entry for a folder of the hub's cache: ``models--ORG--NAME/snapshots/REVISION``."""
    cached, snapshots, revision = ("", "", "", *folder.absolute().parts)[-3:]
    if snapshots != "snapshots" or not cached.startswith("models--"):
        return ()
    name = cached.removeprefix("models--").replace("--", "/")
    return ({"stage": "download", "base_models": [name], "revision": revision},)


def _label(folder: Path) -> str:
    """How to name a part: by the hub if it came from there, else by its folder."""
    if download := _download(folder):
        return str(download[0]["base_models"][0])
    return folder.name if folder.is_absolute() else str(folder)  # homes are nobody's business
