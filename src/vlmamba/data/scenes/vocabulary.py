"""What the world is made of: things, shapes, colours, fills and words, and which combinations are held out."""

from __future__ import annotations

import unicodedata
import zlib
from functools import cache

from vlmamba.data.scenes.words import WORDS

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 32, 32),
    "orange": (255, 138, 0),
    "yellow": (248, 214, 20),
    "green": (34, 158, 52),
    "blue": (36, 84, 222),
    "purple": (128, 44, 172),
    "pink": (255, 130, 188),
    "brown": (124, 70, 28),
    "black": (12, 12, 12),
    "white": (254, 254, 254),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "arrow", "crescent", "oval")
FILLS = ("solid", "outlined", "striped", "dotted")
SIZES = ("small", "medium", "large")
# Pixels at 128: classes stand at least 6 apart, so that "larger" can be seen.
SIZE_PX: dict[str, tuple[int, int]] = {"small": (12, 16), "medium": (23, 28), "large": (34, 40)}
SMALLEST_THING = 15  # below this a drawn thing cannot be told from its neighbours in kind

_EMOJI = """
🐶🐱🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐤🦆🦅🦉🦇🐴🦄🐝🐛🦋🐌🐞🕷🐢🐍🐙🦐🦀🐟🐬🐳🐊🐘🦒🐫🦘🐑🐓🦚🦜🦢🐿🦔🐉
🌵🌲🌴🍀🍁🍄🌹🌻🌷🍎🍐🍋🍌🍉🍓🍑🍍🥥🥝🍅🍆🥑🌶🥕🥔🥐🍞🥨🥚🌭🍔🍕🌮🍦🍩🍪🎂🧁🍬🍭🍯🍺🍷☕🥄
⚽🏀⚾🎾🎱🥊🎯🎮🎲🧩🎨🎸🎹🎺🎻🥁🎤🚗🚕🚌🚒🚑🚜🚲🏍🚂✈🚀🚁⛵🚢⚓🚦⛺🏠🏰🎡🌋⌚📱💻🖨📷📺📻⏰⏳🔋💡🔦🕯💎🔧🔨
🧲💣🔪🛡🔑🔒🔔🎈🎁🎀📦✉📖📌📎✏🔍🔬🔭💊🌡🚽🛁🛋🪑🚪🛏🧹🧺☂👑🎩👕👗👟👢👠🧢🎒👜💍💰🏆🥇👻🤖👽💀🎃⛄🌈☁⚡❄🔥💧🌍👁
👂👃👄🦷🦴✋🛒🛶🛸🪁🪓🧯🪣🪴
"""
_RENAMED = {
    "🐤": "chick", "🐝": "bee", "🐛": "caterpillar", "🐞": "ladybug", "🐳": "whale", "🐫": "camel", "🐿": "squirrel",
    "🌲": "pine tree", "🍀": "clover", "🍎": "apple", "🥝": "kiwi", "🍆": "eggplant", "🌶": "pepper", "🍕": "pizza",
    "🍦": "ice cream", "🍩": "donut", "🎂": "cake", "🍯": "honey pot", "🍺": "beer", "🍷": "wine glass", "☕": "coffee",
    "⚽": "football", "🏀": "basketball", "🎾": "racket", "🎱": "billiard ball", "🎯": "target", "🎮": "gamepad",
    "🎲": "die", "🧩": "puzzle piece", "🎨": "palette", "🎹": "piano", "🥁": "drum", "🚗": "car", "🚒": "fire engine",
    "🏍": "motorcycle", "🚂": "train", "🚦": "traffic light", "🏠": "house", "🏰": "castle", "📱": "phone",
    "💻": "laptop", "📺": "television", "⏳": "hourglass", "💡": "light bulb", "🔦": "flashlight", "💎": "gem",
    "🔪": "knife", "🎁": "gift", "📦": "box", "📖": "book", "📌": "pin", "🔍": "magnifying glass", "🛋": "couch",
    "🎩": "top hat", "👕": "shirt", "👟": "shoe", "👢": "boot", "👠": "high heel", "🧢": "cap", "🎒": "backpack",
    "🥇": "medal", "👽": "alien", "🎃": "pumpkin", "⛄": "snowman", "⚡": "lightning bolt", "🔥": "flame",
    "💧": "drop", "🌍": "globe", "✋": "hand", "🛒": "shopping cart", "🪴": "potted plant", "🍬": "candy", "🔬":
    "microscope", "🍞": "loaf", "🏆": "trophy",
}  # fmt: skip


def _name(symbol: str) -> str:
    """Unicode's name of a symbol without what the picture does not show ("DOG FACE" is "dog")."""
    return _RENAMED.get(symbol) or unicodedata.name(symbol).lower().removesuffix(" face")


THINGS: dict[str, str] = {_name(symbol): symbol for symbol in _EMOJI if not symbol.isspace()}
# A written word never names a thing, shape or colour that could itself be asked about.
WRITTEN: tuple[str, ...] = tuple(
    dict.fromkeys(w for w in WORDS if w not in THINGS and w not in SHAPES and w not in COLOURS)
)

_PLURALS = {
    "mouse": "mice", "sheep": "sheep", "fish": "fish", "die": "dice", "tooth": "teeth", "knife": "knives",
    "loaf": "loaves", "tomato": "tomatoes", "potato": "potatoes",
}  # fmt: skip


def plural(noun: str) -> str:
    """`noun` as one says it of several, "puzzle pieces", "boxes", "mice"."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" and not phrase.startswith("unicorn") else "a ") + phrase


def written_size(px: float) -> str:
    """The world's word for text of a font's size."""
    return SIZES[0] if px < 17 else SIZES[1] if px < 27 else SIZES[2]


@cache
def held_out_pair(colour: str, shape: str) -> bool:
    """Whether this colour of this shape is kept out of training: one in ten, one for every colour and every shape."""
    return (tuple(COLOURS).index(colour) * 3 + SHAPES.index(shape)) % 10 == 0


@cache
def held_out_things(one: str, other: str) -> bool:
    """Whether these two things never share a picture in training: one pair in sixteen, in either order."""
    return one != other and zlib.crc32("|".join(sorted((one, other))).encode()) % 16 == 0


@cache
def held_out_word(word: str) -> bool:
    """Whether this word (any letter string) is never written or named in training: one in eight."""
    return zlib.crc32(word.lower().encode()) % 8 == 0
