"""Cached pictures of single things, shapes and words, from the fonts at hand. Sizes in pixels.

A thing is an RGBA picture, a shape or a word a mask ("L") that is filled with a colour when pasted.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from vlmamba.data.scenes.vocabulary import THINGS

EMOJI_VARIABLE = "VLMAMBA_EMOJI_FONT"
_EMOJI_FILE = "NotoColorEmoji.ttf"
_EMOJI_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "/usr/share/fonts/noto-emoji",
    "/usr/share/fonts/google-noto-emoji",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
_BITMAP_PX = 109  # the one size that the font's bitmaps have
_TEXT_FILES = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_TEXT_FOLDERS = ("/usr/share/fonts/truetype/dejavu", "/usr/share/fonts/dejavu", "/usr/share/fonts/TTF")
FACES = 1 + len(_TEXT_FILES)  # the first is the one bundled with Pillow
_OVERSAMPLE = 4


@cache
def emoji_font() -> Path | None:
    """The file of Noto Color Emoji, from `VLMAMBA_EMOJI_FONT` or a usual place; None, said once, where there is none.

    Raises ValueError when the variable names a file that Pillow cannot read as a 109-px bitmap font.
    """
    named = os.environ.get(EMOJI_VARIABLE)
    if named:
        try:
            ImageFont.truetype(named, _BITMAP_PX)
        except OSError as error:
            raise ValueError(
                f"{EMOJI_VARIABLE}={named!r} is not a readable colour bitmap font ({error}); expected the path of "
                f"{_EMOJI_FILE}, or unset the variable"
            ) from error
        return Path(named)
    for folder in _EMOJI_FOLDERS:
        path = Path(folder).expanduser() / _EMOJI_FILE
        if path.is_file():
            return path
    warnings.warn(
        f"{_EMOJI_FILE} was not found: scenes will hold shapes and words but no everyday things. Install it (Debian: "
        f"apt install fonts-noto-color-emoji) or name the file in {EMOJI_VARIABLE}.",
        stacklevel=2,
    )
    return None


@cache
def available_things() -> tuple[str, ...]:
    """Names of the things that can be drawn here: all of them with the emoji font, none without."""
    return tuple(THINGS) if emoji_font() else ()


@cache
def _glyph(name: str) -> Image.Image:
    font = ImageFont.truetype(str(emoji_font()), _BITMAP_PX)
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 10), THINGS[name], font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


@cache
def thing(name: str, px: int) -> Image.Image:
    """RGBA picture of a thing whose longer side is `px`."""
    glyph = _glyph(name)
    scale = px / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    return glyph.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


@cache
def thing_cover(name: str, px: int) -> np.ndarray:
    """Which pixels of its picture a thing covers, (height, width) bool."""
    return np.asarray(thing(name, px).getchannel("A")) >= 128


@cache
def thing_ratio(name: str) -> tuple[float, float]:
    """Width and height of a thing as parts of its longer side."""
    width, height = _glyph(name).size
    return width / max(width, height), height / max(width, height)


def _around(points: int, radius: Callable[[int], float]) -> list[tuple[float, float]]:
    turns = [(radius(i), math.pi * (2 * i / points - 0.5)) for i in range(points)]
    return [(0.5 + r * math.cos(a), 0.5 + r * math.sin(a)) for r, a in turns]


def _heart() -> list[tuple[float, float]]:
    turns = [i * math.pi / 24 for i in range(48)]
    xs = [16 * math.sin(t) ** 3 for t in turns]
    ys = [-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in turns]
    return [(0.5 + x / 34, 0.46 + y / 33) for x, y in zip(xs, ys)]


def _crescent() -> list[tuple[float, float]]:
    outer = [(0.62, 0.5, math.radians(d)) for d in range(60, 301, 8)]
    inner = [(0.87, 0.435, math.radians(d)) for d in range(266, 93, -8)]
    return [(x + r * math.cos(a), 0.5 + r * math.sin(a)) for x, r, a in outer + inner]


# Outlines in the unit square. The circle and the oval are drawn as ellipses.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)],
    "triangle": [(0.5, 0.04), (1.0, 0.96), (0.0, 0.96)],
    "star": _around(10, lambda i: 0.52 if i % 2 == 0 else 0.22),
    "heart": _heart(),
    "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
    "cross": [(a, b) for a, b in zip(
        (0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33, 0, 0, 0.33),
        (0, 0, 0.33, 0.33, 0.67, 0.67, 1, 1, 0.67, 0.67, 0.33, 0.33),
    )],
    "arrow": [(0.0, 0.34), (0.5, 0.34), (0.5, 0.06), (1.0, 0.5), (0.5, 0.94), (0.5, 0.66), (0.0, 0.66)],
    "crescent": _crescent(),
}  # fmt: skip
_ELLIPSES = {"circle": (0.0, 0.0, 1.0, 1.0), "oval": (0.0, 0.22, 1.0, 0.78)}
# The part of its box that a shape covers, for bounding what an overlap hides.
SHAPE_AREA = {
    "circle": 0.78, "square": 0.84, "triangle": 0.46, "star": 0.33, "heart": 0.56, "diamond": 0.36, "cross": 0.55,
    "arrow": 0.38, "crescent": 0.30, "oval": 0.44,
}  # fmt: skip


def _draw_outline(draw: ImageDraw.ImageDraw, shape: str, side: int, fill: int) -> None:
    if shape in _ELLIPSES:
        draw.ellipse([v * (side - 1) for v in _ELLIPSES[shape]], fill=fill)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _POLYGONS[shape]], fill=fill)


@cache
def shape_mask(shape: str, fill: str, px: int) -> Image.Image:
    """Mask of a shape of `px` by `px`, antialiased."""
    side = px * _OVERSAMPLE
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    _draw_outline(draw, shape, side, 255)
    if fill != "solid":
        inner = _eroded(mask, max(2.0, px * 0.085) * _OVERSAMPLE)
        pattern = Image.new("L", (side, side))
        pen = ImageDraw.Draw(pattern)
        if fill == "striped":
            for y in range(0, side, _pitch(px) * _OVERSAMPLE):
                pen.rectangle((0, y, side, y + _pitch(px) * _OVERSAMPLE // 2 - 1), fill=255)
        elif fill == "dotted":
            step, radius = _pitch(px) * _OVERSAMPLE, _pitch(px) * _OVERSAMPLE * 0.36
            for row, y in enumerate(range(step // 2, side + step, step)):
                for x in range((row % 2) * step // 2, side + step, step):
                    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        mask.paste(pattern, (0, 0), inner)
    return mask.reduce(_OVERSAMPLE)


@cache
def shape_cover(shape: str, px: int) -> np.ndarray:
    """Which pixels lie within a shape's outline, whatever fills it, (px, px) bool."""
    return np.asarray(shape_mask(shape, "solid", px)) >= 128


def _pitch(px: int) -> int:
    return 4 if px < 30 else 6


def _eroded(mask: Image.Image, width: float) -> Image.Image:
    """The mask less a rim of `width`: what shifting it in sixteen directions leaves everywhere."""
    inner = mask
    for i in range(16):
        angle = math.pi * i / 8
        shifted = Image.new("L", mask.size)
        shifted.paste(mask, (round(width * math.cos(angle)), round(width * math.sin(angle))))
        inner = ImageChops.darker(inner, shifted)
    return inner


@cache
def _face(index: int, px: int) -> ImageFont.FreeTypeFont:
    if index:
        for folder in _TEXT_FOLDERS:
            path = Path(folder) / _TEXT_FILES[index - 1]
            if path.is_file():
                return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)
    font = ImageFont.load_default(px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # of any size that is named
    return font


@lru_cache(maxsize=16384)
def _line(text: str, face: int, px: int) -> tuple[Image.Image, float]:
    """Mask of a line of text, cropped to its ink, and how far left of it the pen began."""
    ink, (left, _) = _face(face, px).getmask2(text, "L")
    box = ink.getbbox() or (0, 0, *ink.size)
    mask = Image.new("L", (box[2] - box[0], box[3] - box[1]))
    mask.im.paste(ink.crop(box), (0, 0, *mask.size))
    return mask, box[0] + left


def text_mask(text: str, face: int, px: int) -> Image.Image:
    """Mask of a line of text, cropped to its ink; `px` is the font's size (capitals are about 0.73 of it)."""
    return _line(text, face, px)[0]


@lru_cache(maxsize=16384)
def character_edges(text: str, face: int, px: int) -> tuple[float, ...]:
    """Where each character of a line begins, and the last one ends, in pixels from the left edge of its mask."""
    font, start = _face(face, px), _line(text, face, px)[1]
    return tuple(font.getlength(text[:count]) - start for count in range(len(text) + 1))


@lru_cache(maxsize=65536)
def text_size(text: str, face: int, px: int) -> tuple[int, int]:
    """Width and height of the ink of `text`."""
    left, top, right, bottom = _face(face, px).getbbox(text)
    return int(right - left), int(bottom - top)
