"""Pictures of emoji: the sheet that comes with the package, or any emoji from the font.

The sheet holds every emoji of `names.EMOJI`, so drawing needs no font. It was rendered
from Noto Color Emoji (SIL Open Font License 1.1); ``python -m data_recipes.scenes.sprites``
writes it anew.
"""

from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_recipes.scenes.names import EMOJI, EMOJI_NAMES
from vlm.errors import MissingExtraError

SHEET = Path(__file__).with_name("sprites.png")
SPRITE_SIZE = 72  # pixels, the side of one sprite in the sheet
_COLUMNS = 16
_FONT_PIXELS = 109  # the one size that the bitmap font has
_FONT_PATHS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)


def find_font(paths: tuple[Path, ...] = _FONT_PATHS) -> Path:
    """Where the Noto Color Emoji font lies.

    Raises:
        MissingExtraError: it is in none of ``paths``; the message names the package.
    """
    for path in paths:
        if path.is_file():
            return path
    raise MissingExtraError(
        f"the Noto Color Emoji font is in none of {', '.join(map(str, paths))}; "
        "install it: apt-get install fonts-noto-color-emoji"
    )


def render_emoji(character: str, font: Path) -> Image.Image:
    """One emoji from the font: a square RGBA picture of side `SPRITE_SIZE`, filled to its edges."""
    face = ImageFont.truetype(str(font), _FONT_PIXELS)
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), character, font=face, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font {font} has no picture of {character!r}")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def write_sheet(path: Path = SHEET) -> None:
    """Render all of `names.EMOJI` from the font into one PNG."""
    font = find_font()
    rows = -(-len(EMOJI) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE), (0, 0, 0, 0))
    for index, (character, _) in enumerate(EMOJI):
        sheet.paste(render_emoji(character, font), _corner(index))
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)


@lru_cache(maxsize=16384)
def emoji_sprite(name: str, size: int, angle: int) -> Image.Image:
    """An emoji by name, ``size`` pixels wide, turned by ``angle`` degrees. Do not change it."""
    left, top = _corner(EMOJI_NAMES.index(name))
    sprite = _sheet().crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
    return turn_and_scale(sprite, size, angle)


def turn_and_scale(sprite: Image.Image, size: int, angle: int) -> Image.Image:
    """Turn a square RGBA picture about its middle, then resize it to ``size`` pixels."""
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BICUBIC)
    return sprite.resize((size, size), Image.Resampling.LANCZOS)


@cache
def _sheet() -> Image.Image:
    with Image.open(SHEET) as file:
        return file.convert("RGBA")


def _corner(index: int) -> tuple[int, int]:
    row, column = divmod(index, _COLUMNS)
    return column * SPRITE_SIZE, row * SPRITE_SIZE


if __name__ == "__main__":
    write_sheet()
