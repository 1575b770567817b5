"""From what a row calls a picture to a path inside the allowed folders, or to bytes."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from data_recipes.formats.faults import FaultError
from vlm.errors import ImageError
from vlm.image_bytes import read_path, shorten
from vlm.images import DEFAULT_LIMITS

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")


class Pictures:
    """Binds names to the pictures' folders; nothing is opened, and fetched only if asked for.

    Args:
        folder: of the data file.
        images: another folder in which pictures may lie; names are looked up there first.
        fetch: gives the bytes of a picture of the web; without it URLs are refused.
    """

    def __init__(
        self,
        folder: Path,
        images: Path | str | None = None,
        fetch: Callable[[str], bytes] | None = None,
    ) -> None:
        self._fetch = fetch
        self._folders = [os.path.abspath(each) for each in (images, folder) if each is not None]
        self._roots = [os.path.realpath(each) for each in self._folders]
        self._real = functools.lru_cache(1024)(os.path.realpath)

    def bind(self, value: Any) -> str | bytes:
        """An absolute path without links, or bytes.

        Args:
            value: a path, a ``data:`` URI, bytes, or ``{"bytes", "path"}``.

        Raises:
            FaultError: ``path_escape``, ``remote_url`` or ``malformed``.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if not isinstance(value, str) or not value:
            raise FaultError(f"a picture is {value!r}; give a path", "malformed")
        if value.startswith("data:"):
            try:
                return read_path(value, DEFAULT_LIMITS.max_bytes)
            except ImageError as error:
                raise FaultError(str(error), "malformed") from error
        if value.startswith("file://"):
            value = value.removeprefix("file://")
        if _SCHEME.match(value):
            return self._remote(value)
        if "\0" in value:
            raise FaultError(f"{shorten(value)} is no possible file name", "malformed")
        return self._inside(value)

    def all(self, values: Iterable[Any]) -> tuple[str | bytes, ...]:
        """The same for several."""
        return tuple(map(self.bind, values))

    def _remote(self, url: str) -> bytes:
        if self._fetch is None:
            reason = f"{shorten(url)} is a URL; download it first, or allow it by --allow-remote"
            raise FaultError(reason, "remote_url")
        try:
            return self._fetch(url)
        except ImageError as error:
            raise FaultError(str(error), "remote_url") from error

    def _inside(self, name: str) -> str:
        places = [os.path.join(folder, name) for folder in self._folders]
        place = next((p for p in places[:-1] if os.path.lexists(p)), None)
        if place is None:
            is_beside = len(places) == 1 or os.path.lexists(places[-1])
            place = places[-1] if is_beside else places[0]
        head, tail = os.path.split(place)
        found = place if tail in ("", ".", "..") else os.path.join(self._real(head), tail)
        if (found == place and tail in ("", ".", "..")) or os.path.islink(found):
            found = os.path.realpath(found)
        if not any(found.startswith(os.path.join(root, "")) for root in self._roots):
            raise FaultError(
                f"{shorten(name)} leads to {shorten(found)}, out of the data's folder; move the "
                "picture, or allow its folder by --images DIR",
                "path_escape",
            )
        return found


def as_list(value: Any) -> list[Any]:
    """``images`` or ``image`` of a row: nothing, one or several."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
