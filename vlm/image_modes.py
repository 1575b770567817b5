"""From any Pillow mode to 8-bit RGB, upright, on a white background.

What Pillow's own ``convert("RGB")`` would spoil is done here: it clips 16-bit and
float samples instead of scaling them, shows the colour hidden under transparency,
and ignores colour profiles.
"""

import io

from PIL import Image, ImageCms

from vlm.errors import ImageError

BACKGROUND = (255, 255, 255)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's reader makes of a PNG's samples; the key colour stays as the file has it.
_KEY_SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}

# Colour space of a profile (ICC.1:2022, table 19) that fits each mode.
_PROFILE_SPACE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded picture of any mode to 8-bit sRGB on a white background.

    - Transparency (RGBA, LA, palette or key colour) is composited over white.
    - 16-bit grey is scaled by 1/257. ``I`` and ``F`` have no declared range: values
      within 0..1 (``F`` only), 0..255 or 0..65535 are scaled from that range, others
      from their own minimum and maximum, or to black if these are the same.
    - CMYK, Lab and pictures with a colour profile are converted to sRGB; a broken
      profile, or one for another colour space, is ignored.

    Raises:
        ImageError: ``unsupported_mode`` for a mode that has no way to RGB;
            ``undecodable`` for samples that are NaN or infinite.
    """
    if image.mode == "RGB" and not image.info:
        return image
    profile = image.info.get("icc_profile")
    image = _to_eight_bits(image)
    try:
        if image.has_transparency_data:
            return _flatten(image, profile)
        return _to_srgb(image, profile)
    except ValueError as error:  # Pillow knows no conversion
        raise _unsupported(image.mode) from error


def _unsupported(mode: str) -> ImageError:
    return ImageError(
        f"pictures of mode {mode!r} are not read; save it as 8-bit RGB", "unsupported_mode"
    )


def _flatten(image: Image.Image, profile: bytes | None) -> Image.Image:
    rgba = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
    is_grey = image.mode in ("LA", "La")  # a profile for grey wants one channel
    colour = _to_srgb(rgba.getchannel("R") if is_grey else rgba.convert("RGB"), profile)
    flat = Image.new("RGB", colour.size, BACKGROUND)
    flat.paste(colour, mask=rgba.getchannel("A"))
    return flat


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "I;16N":
        raise _unsupported(image.mode)  # Pillow would read every sample as 255
    key = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif image.mode in ("I", "F"):
        low, high = _sample_range(image)
    else:
        return image
    scale = 255.0 / (high - low) if high > low else 0.0
    # Conversion to L cuts the fraction off, hence the half.
    scaled = image.convert("F").point(lambda value: value * scale + (0.5 - low * scale))
    grey = scaled.convert("L")
    grey.info.pop("transparency", None)  # a key of the old depth means nothing now
    if isinstance(key, int):
        import numpy as np

        seen = np.asarray(image) != key
        grey.putalpha(Image.fromarray(seen.astype(np.uint8) * np.uint8(255)))
    return grey


def _sample_range(image: Image.Image) -> tuple[float, float]:
    extrema = image.getextrema()
    low, high = float(extrema[0]), float(extrema[1])  # type: ignore[arg-type]
    if image.mode == "F":
        import numpy as np

        if not np.isfinite(np.asarray(image)).all():  # extrema pass over NaN
            text = "the picture holds NaN or infinite values; save it as 8-bit RGB"
            raise ImageError(text, "undecodable")
    for top in (1.0, 255.0, 65535.0):
        if low >= 0 and high <= top and (top > 1 or image.mode == "F"):
            return 0.0, top
    return low, high


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # not in place
        return converted
    if image.mode not in _PROFILE_SPACE:
        image = image.convert("RGB")
    through_profile = _apply_profile(image, profile) if profile else None
    return through_profile or image.convert("RGB")


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert through `profile`; None when it is sRGB already, broken or unfit."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space != _PROFILE_SPACE[image.mode]:
            return None
        if "sRGB" in (source.profile.profile_description or ""):
            return None
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def scale_key(image: Image.Image, layout: object) -> None:
    """Bring the key colour of a PNG of 2, 4 or 16 bits to 8, as its samples were.

    Args:
        image: just loaded; its ``info`` is mended.
        layout: of its samples in the file, Pillow's name.
    """
    key = image.info.get("transparency")
    scale = _KEY_SCALES.get(layout) if isinstance(layout, str) else None
    if scale is not None and isinstance(key, int):
        image.info["transparency"] = int(key * scale)
    elif scale is not None and isinstance(key, tuple):
        image.info["transparency"] = tuple(int(value * scale) for value in key)


def upright(image: Image.Image, exif: bytes | None) -> Image.Image:
    """Turn a picture as its EXIF orientation tells; EXIF that is corrupt is ignored."""
    turn = _UPRIGHT.get(orientation(exif)) if isinstance(exif, bytes) else None
    return image if turn is None else image.transpose(turn)


def orientation(exif: bytes) -> int:
    """The orientation in the first directory of an EXIF block, 1 when it has none.

    Read here because Pillow's reader warns on corrupt blocks, and warnings can
    not be silenced in one thread alone.
    """
    block = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II*\x00": "little", b"MM\x00*": "big"}.get(block[:4])
    if order is None:
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(block[start : start + size], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    for index in range(number(directory, 2)):
        entry = directory + 2 + 12 * index
        if entry + 12 > len(block):
            return 1
        if number(entry, 2) == _ORIENTATION_TAG:
            return number(entry + 8, 2 if number(entry + 2, 2) == 3 else 4)
    return 1
