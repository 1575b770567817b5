"""What can be wrong with a record: the codes, and which of them keep a record out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        title: a few words for people.
        about: what it does to training, and what to do about it.
        is_fault: a fault puts the record into quarantine; anything else is only told.
    """

    title: str
    about: str
    is_fault: bool = True


KINDS = {
    "malformed": Kind("Malformed", "No record can be made of this; correct its source."),
    "missing": Kind("Missing file", "The picture's file does not exist."),
    "unreadable": Kind("Unreadable", "No picture of a known format, or one that is damaged."),
    "truncated": Kind("Truncated", "The picture's file stops before its end."),
    "too_large": Kind("Too large", "More bytes or pixels than the image gate lets in."),
    "aspect": Kind("Extreme aspect", "One side is many times the other; little of it is seen."),
    "path_escape": Kind("Path escape", "The picture lies outside of the data's folder."),
    "remote_url": Kind("Remote URL", "Pictures are not fetched; download them first."),
    "image_mismatch": Kind("Picture mismatch", "Image places and pictures differ in number."),
    "empty_answer": Kind("Empty answer", "An assistant's turn says nothing."),
    "no_supervised": Kind("Nothing supervised", "No token of it is learnt; it costs time only."),
    "too_long": Kind("Too long", "More positions than the model has."),
    "special_token": Kind("Special token in text", "Often what is left of another template."),
    "control_character": Kind("Control character", "Often a wrong encoding or a bad export."),
    "duplicate_record": Kind("Duplicate record", "The same pictures and turns came before."),
    "rotated": Kind("Rotated by EXIF", "It is turned upright here; others may not do so.", False),
    "animated": Kind("Animated", "Only the first frame is used.", False),
    "duplicate_picture": Kind("Duplicate picture", "Another file has the same bytes.", False),
    "near_duplicate": Kind("Near duplicate", "Another picture looks nearly the same.", False),
}

# Codes of `vlm.errors.ImageError` that come under another name here.
_IMAGE_CODES = {
    "too_thin": "aspect",
    "too_many_bytes": "too_large",
    "too_many_pixels": "too_large",
}


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        code: a key of `KINDS`.
        reason: on one line.
        id: of the record; where it lies in the file if no record could be made of it.
        number: of the record in reading order, from 0; None if there is none.
    """

    code: str
    reason: str
    id: str
    number: int | None = None


def image_kind(code: str) -> str:
    """The kind of an ImageError with this code."""
    code = _IMAGE_CODES.get(code, code)
    return code if code in KINDS else "unreadable"


def reading_kind(code: str, reason: str) -> str:
    """The kind of what a reader or `parse_messages` refused.

    A reader's ``truncated`` is the data file, and no picture.
    """
    if "assistant is empty" in reason:
        return "empty_answer"
    if "image part" in reason or "<image>" in reason:
        return "image_mismatch"
    if "NUL character" in reason or "lone surrogate" in reason:
        return "control_character"
    return code if code in KINDS and code != "truncated" else "malformed"
