"""What the header of a picture tells, without decoding a pixel; imports no torch."""

from dataclasses import dataclass

from vlm.image_modes import orientation
from vlm.images import DEFAULT_LIMITS, ImageLimits, is_animated, open_encoded, truncated

# What the file must hold near its end, or its last part is missing.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_TAIL = 1 << 16  # some programs write their own notes behind the picture


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a picture says of itself.

    Attributes:
        format: found in the content, for example ``"JPEG"``.
        size: width and height in pixels, before turning.
        orientation: of EXIF, 1 to 8; 1 is upright.
        animated: whether there are more frames or pages than one.
    """

    format: str
    size: tuple[int, int]
    orientation: int
    animated: bool


def read_header(
    data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "the picture"
) -> ImageHeader:
    """The facts in the header of an encoded picture.

    Args:
        data: the whole encoded picture.
        limits: as in `vlm.images.load_image`.
        name: for errors.

    Raises:
        ImageError: as `load_image`, as far as no pixel must be decoded: JPEG, PNG and WebP
            files that lack their end are ``truncated`` here already, a PNG even
            if only the mark behind its pixels is gone.
    """
    image, _, found = open_encoded(data, name, limits)
    if found in _ENDS and _ENDS[found] not in data[-_TAIL:]:
        raise truncated(name)
    exif = image.info.get("exif")
    turned = orientation(exif) if isinstance(exif, bytes) else 1
    return ImageHeader(found, image.size, turned, is_animated(image))
