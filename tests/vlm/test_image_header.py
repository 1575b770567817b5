"""Headers: the facts that a full decode finds as well, and ends that are missing."""

import io

import pytest
from PIL import Image

from vlm.errors import ImageError
from vlm.image_header import ImageHeader, read_header
from vlm.images import load_image


def encoded(form: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_the_same_facts_as_a_full_decode(form: str) -> None:
    data = encoded(form)
    clean = load_image(data)
    assert read_header(data) == ImageHeader(clean.format, clean.size, 1, clean.animated)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_end_that_is_missing_is_truncated_for_both(form: str) -> None:
    data = encoded(form)[:-60]
    for read in (read_header, load_image):
        with pytest.raises(ImageError) as caught:
            read(data)
        assert caught.value.code == "truncated"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_notes_behind_the_picture_do_no_harm(form: str) -> None:
    data = encoded(form) + b"notes of some program" * 100
    assert read_header(data).size == load_image(data).size


def test_a_turned_picture() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = encoded("JPEG", exif=exif)
    assert read_header(data).orientation == 6 and read_header(data).size == (40, 30)
    assert load_image(data).pixels.size == (30, 40)


def test_more_frames_than_one() -> None:
    frames = [Image.new("L", (8, 8), i) for i in range(3)]
    data = io.BytesIO()
    frames[0].save(data, "gif", save_all=True, append_images=frames[1:])
    assert read_header(data.getvalue()).animated
