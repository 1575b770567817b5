"""The emoji of the drawn world, each with its Unicode name (one or two words, lower case)."""

import unicodedata

_CHARACTERS = (
    # animals
    "🐄🐅🐇🐈🐊🐋🐌🐍🐎🐑🐒🐓🐕🐖🐘🐙🐜🐝🐟🐢🐦🐧🐨🐬🕷🦀🦂🦅🦆🦇🦈🦉🦋🦌🦍🦎🦑🦔🦘🦙🦚🦜🦞🦢🦩🦫"
    # food and plants
    "🌭🌮🌵🌷🌹🌻🍄🍅🍆🍉🍋🍌🍍🍐🍑🍓🍔🍩🍪🍭🥐🥑🥒🥔🥕🥚🥝🥥🥦🥨🥪🧁🧅🧇🍞🍿"
    # things
    "⏰🎈🏆🎸🎻🎺🎤📷📺📻🔑🔒🔔🔨🔧🕯👑💍💣🚀🚁🚌🚑🚕🚜🚢🚲✈⛵⛺⚓🚪🛁🪑🫖🥄🪣🪜🧲🧭🔥👻💀🔭🔋🧸🪁"
)


def _name(character: str) -> str:
    return unicodedata.name(character).lower()


# (character, name) in a fixed order. The order is also that of the sprite sheet: append only.
EMOJI: tuple[tuple[str, str], ...] = tuple((char, _name(char)) for char in _CHARACTERS)
EMOJI_NAMES: tuple[str, ...] = tuple(name for _, name in EMOJI)
CHARACTER_OF: dict[str, str] = {name: char for char, name in EMOJI}
