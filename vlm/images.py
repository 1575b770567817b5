"""The one image gate: any source in, clean 8-bit RGB or a typed error out.

Browser, command line, Python and training all come through `load_image`, so the same
picture gives the same pixels everywhere. The order of the steps is the safety:

    byte cap -> format by content, from a fixed list -> caps on pixels and shape from the
    header, before any decoding -> JPEG draft -> full decode (a truncated file is an error,
    never half grey) -> EXIF upright -> 8-bit RGB on white (`vlm.image_modes`)

Decoder classes are called directly instead of through ``PIL.Image.open``: only those on
the list can run, and Pillow's process-wide pixel limit, with its warning, plays no part.
"""

import functools
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vlm.errors import ImageError
from vlm.image_bytes import check_bytes, read_path, shorten, sniff, webp_size
from vlm.image_modes import scale_key, to_rgb, upright

_DECODERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may ask for.

    Args:
        max_bytes: largest encoded size, in bytes.
        max_pixels: largest width times height that the header declares.
        max_aspect: how many times longer than the other a side may be. A tower that makes
            the shorter side fit would blow up a line of 1 x 1,000,000 to gigabytes.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 100_000_000
    max_aspect: int = 200


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, eq=False)
class CleanImage:
    """A picture that has passed the gate. Treat `pixels` as read-only.

    Args:
        pixels: upright 8-bit RGB.
        format: the format found in the content, for example ``"JPEG"``; ``"PIL"``
            for a picture that came in memory.
        size: width and height that the header declared, before turning and draft.
        animated: True when the file holds more frames or pages; only the first was read.
    """

    pixels: Image.Image
    format: str
    size: tuple[int, int]
    animated: bool = False

    @property
    def is_drafted(self) -> bool:
        """Whether it is a JPEG that was decoded smaller than it is."""
        return sorted(self.size) != sorted(self.pixels.size)

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of what a model sees: SHA-256 over size and RGB samples.

        Taken from the pixels and not from the file, so that path, bytes and PIL picture
        share one cache key while a draft decode of the same file gets its own.
        Computed on first use: training never needs it.
        """
        digest = hashlib.sha256(b"RGB %d %d\n" % self.pixels.size)
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | CleanImage


def load_image(
    source: ImageSource,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    draft_to: int | None = None,
    name: str = "the picture",
) -> CleanImage:
    """Bring one picture through the gate.

    Args:
        source: a path, a ``data:`` URI, encoded bytes, or a PIL picture. A clean
            picture passes through unchanged. http(s) URLs are refused.
        limits: caps on bytes, pixels and shape.
        draft_to: JPEG only: decode at 1/2, 1/4 or 1/8 scale as long as both sides
            stay at least this many pixels. Much faster for big photos; the pixels
            then differ slightly from a full decode.
        name: of what comes in memory, for errors.

    Raises:
        ImageError: with a ``code``: ``missing``, ``unreadable``, ``remote_url``,
            ``bad_data_uri``, ``empty_image``, ``undecodable``, ``truncated``,
            ``too_many_bytes``, ``too_many_pixels`` (or more than memory holds now),
            ``too_thin``, ``unsupported_format``, ``unsupported_mode`` or
            ``unsupported_source``.
    """
    if isinstance(source, CleanImage):
        return source
    try:
        return _clean(source, limits, draft_to, name)
    except MemoryError as error:
        shown = shorten(os.fspath(source)) if isinstance(source, str | os.PathLike) else name
        raise ImageError(
            f"{shown} needs more memory than is free; save a smaller copy", "too_many_pixels"
        ) from error


def _clean(source: ImageSource, limits: ImageLimits, draft_to: int | None, name: str) -> CleanImage:
    if isinstance(source, Image.Image):
        return _clean_picture(source, limits, name)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        check_bytes(len(data), limits.max_bytes, name)
    elif isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        data, name = read_path(path, limits.max_bytes), shorten(path)
    else:
        raise ImageError(
            f"a {type(source).__name__} is no picture; pass a path, bytes or a PIL image",
            "unsupported_source",
        )
    return _clean_bytes(data, name, limits, draft_to)


def _clean_bytes(data: bytes, name: str, limits: ImageLimits, draft_to: int | None) -> CleanImage:
    image, stream, found = open_encoded(data, name, limits)
    size = image.size
    if draft_to is not None:
        image.draft(image.mode, (draft_to, draft_to))
    stream.must_not_end = True
    _load(image, name)
    stream.must_not_end = False
    pixels = _convert(image, name)
    return CleanImage(_without_info(pixels, image), found, size, is_animated(image))


def open_encoded(
    data: bytes, name: str, limits: ImageLimits
) -> tuple[ImageFile.ImageFile, "_Stream", str]:
    """Header only: picture, its stream, its format; raises ImageError as `load_image`."""
    found = sniff(data, name)
    decoder = _heic_decoder(name) if found == "HEIC" else _DECODERS[found]
    if found == "WEBP":
        if len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise truncated(name)
        _check_size(webp_size(data) or (1, 1), limits, name)  # its decoder begins with a canvas
    stream = _Stream(data)
    try:
        image = decoder(stream)
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise ImageError(f"{name} declares too many pixels", "too_many_pixels") from error
        raise ImageError(
            f"{name} is a damaged {found} file; save or download it again", "undecodable"
        ) from error
    _check_size(image.size, limits, name)
    return image, stream, found


def _clean_picture(picture: Image.Image, limits: ImageLimits, name: str) -> CleanImage:
    _check_size(picture.size, limits, name)
    size = picture.size
    _load(picture, name)
    pixels = _convert(picture, name)
    return CleanImage(_without_info(pixels, picture), "PIL", size)


def _load(image: Image.Image, name: str) -> None:
    tiles = getattr(image, "tile", None) or []
    if isinstance(image, TiffImagePlugin.TiffImageFile) and tiles:
        rows = image.tag_v2[TiffImagePlugin.IMAGELENGTH]  # `height` counts them turned already
        if max(tile.extents[3] for tile in tiles) < rows:
            raise truncated(name)  # Pillow would leave what no strip covers black
    layout = tiles[0].args if tiles else None
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes make decoders raise nearly anything
        raise truncated(name) from error
    scale_key(image, layout)


def _convert(image: Image.Image, name: str) -> Image.Image:
    try:
        return upright(to_rgb(image), image.info.get("exif"))
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a palette, a profile or a key that is none
        raise ImageError(
            f"{name} has colours that cannot be made out; save it as 8-bit RGB", "undecodable"
        ) from error


def truncated(name: str) -> ImageError:
    """The error of a file that stops too early."""
    return ImageError(
        f"{name} is damaged or stops before its end; copy or download it again", "truncated"
    )


def _check_size(size: tuple[int, int], limits: ImageLimits, name: str) -> None:
    width, height = size
    if 0 in size:
        raise ImageError(f"{name} has no pixels; pass one with width and height", "empty_image")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} declares {width:,} x {height:,} pixels, over the limit of "
            f"{limits.max_pixels:,}; save a smaller copy",
            "too_many_pixels",
        )
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"{name} has {width:,} x {height:,} pixels, one side more than {limits.max_aspect:,} "
            "times the other; crop it",
            "too_thin",
        )


def _without_info(pixels: Image.Image, source: Image.Image) -> Image.Image:
    """A plain picture that shares nothing with its source: no file, profile or EXIF."""
    if pixels is source:
        pixels = source.copy()
    pixels.info = {}
    return pixels


def is_animated(image: Image.Image) -> bool:
    """Whether a picture that is open has more than one frame; looks no further than the second."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the frames after the first are not ours to judge
        return False


def _heic_decoder(name: str) -> Callable[[io.BytesIO], ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            f"{name} is a HEIC picture, which needs an extra: pip install 'vlm[heic]'",
            "unsupported_format",
        ) from error
    decoder: Callable[[io.BytesIO], ImageFile.ImageFile] = HeifImageFile
    return decoder


class _Stream(io.BytesIO):
    """Encoded bytes whose end is an error while pixels are decoded.

    Pillow has a process-wide switch, often set by training scripts, that paints the
    missing part of a truncated file grey. Raising here makes that switch powerless.
    """

    must_not_end = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and size != 0 and self.must_not_end:
            raise EOFError("end of the encoded picture")
        return data
