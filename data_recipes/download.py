"""Fetch a publisher's files, or find them in a folder."""

import errno
import hashlib
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import http_get

from data_recipes.recipe import Source
from vlm.errors import ConfigError, RecordError


def fetch(sources: Iterable[Source], folder: Path) -> None:
    """Download what ``folder`` lacks; a broken download resumes from its ``.part`` file.

    Raises:
        ConfigError: naming each file that is absent, and where it comes from.
        RecordError: a file is not what its publisher's checksum says.
    """
    failed: list[str] = []
    for source in sources:
        path = folder / source.file
        if not path.exists():
            reason = _download(source, path)
            if reason:
                failed.append(f"{source.file} <- {source.url or source.page} ({reason})")
                continue
        check(source, path)
    if failed:
        raise ConfigError(
            f"cannot download; put into one folder: {'; '.join(failed)}; then add --from-dir FOLDER"
        )


def require(sources: Iterable[Source], folder: Path) -> None:
    """Raise ConfigError naming each file that ``folder`` lacks and its URL; check the others."""
    absent = []
    for source in sources:
        if (folder / source.file).exists():
            check(source, folder / source.file)
        else:
            absent.append(f"{source.file} <- {source.url or source.page}")
    if absent:
        raise ConfigError(f"{folder} lacks: {'; '.join(absent)}; put them there")


def check(source: Source, path: Path) -> None:
    """Raise RecordError unless the file has the checksum that its publisher gives, if any."""
    if source.sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise RecordError(f"{path}: sha256 {found}, not {source.sha256}; delete it and try again")


def _download(source: Source, path: Path) -> str | None:
    """Why the file could not be fetched; None when it is there."""
    if source.url is None:
        return "by hand only"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("ab") as file:
            http_get(source.url, file, resume_size=file.tell())
    except HTTPError as error:
        return " ".join(str(error).split()) or type(error).__name__
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RecordError(f"{part}: the disk is full; make room and run it again") from error
        return " ".join(str(error).split())
    part.replace(path)
    return None
