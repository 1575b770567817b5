"""What the HTML pages share; each needs no other file and no network."""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image


def template(name: str) -> Template:
    """A template by its path in this package; every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def data_uri(picture: Image.Image, quality: int) -> str:
    """A picture as WebP inside a ``data:`` URI."""
    stream = io.BytesIO()
    picture.save(stream, "webp", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
