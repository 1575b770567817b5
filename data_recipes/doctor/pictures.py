"""One look at a picture: its header, the hash of its bytes, its pixels if they are asked for."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_recipes.pages import data_uri
from vlm.errors import ImageError
from vlm.image_bytes import read_path, shorten
from vlm.image_header import ImageHeader, read_header
from vlm.images import DEFAULT_LIMITS, CleanImage, load_image

HASH_SIDE = 16  # 16 x 16 signs
_FLAT = 2  # levels: smaller steps are noise of JPEG and tell nothing
_THUMBNAIL = 176


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a picture found.

    Attributes:
        name: of the picture, for people.
        error: code of `vlm.errors.ImageError` and reason; None if it can be used.
        header: None if there is an error.
        digest: of the encoded bytes; empty if they could not be read.
        signs: `difference_hash` of the pixels; None if they were not decoded.
    """

    name: str
    error: tuple[str, str] | None = None
    header: ImageHeader | None = None
    digest: bytes = b""
    signs: bytes | None = None


def look(source: str | bytes, name: str, decode: bool) -> Look:
    """Read a picture whole, its header and its end; its pixels too with `decode`."""
    digest = b""
    try:
        data = source if isinstance(source, bytes) else _read(source)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        header = read_header(data, name=name)
        # A draft touches every byte of a JPEG and transforms fewer of them.
        pixels = load_image(data, draft_to=2 * HASH_SIDE, name=name) if decode else None
    except ImageError as error:
        return Look(name, (error.code, str(error)), digest=digest)
    return Look(name, None, header, digest, difference_hash(pixels) if pixels else None)


def _read(path: str) -> bytes:
    return read_path(os.fspath(path), DEFAULT_LIMITS.max_bytes)


def name_of(source: str | bytes, record_id: str, index: int) -> str:
    """A picture's name for people: its path, or its place in its record."""
    if isinstance(source, str):
        return shorten(source)
    return f"picture {index + 1} of {record_id!r}"


def difference_hash(image: CleanImage) -> bytes:
    """Which neighbours grow brighter from left to right: 256 signs in 32 bytes.

    Steps of less than `_FLAT` levels count as none, so a plain surface gives zeros. After
    Krawetz 2013, https://www.hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html,
    which takes 8 x 8: too few to tell drawings apart.
    """
    grey = image.pixels.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)
    return np.packbits(np.diff(levels, axis=1) >= _FLAT).tobytes()


def thumbnail(source: str | bytes) -> str | None:
    """A small WebP as a ``data:`` URI, upright; None if the picture cannot be used."""
    try:
        pixels = load_image(source, draft_to=_THUMBNAIL).pixels
    except ImageError:
        return None
    pixels.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return data_uri(pixels, quality=70)
