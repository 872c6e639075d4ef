"""Drawing a symbolic scene with Pillow, at any size."""

from __future__ import annotations

import random
from functools import cache

from PIL import Image, ImageDraw

from vlmamba.data.scenes import sprites
from vlmamba.data.scenes.pages import PLOT, PLOT_LYING, TOP, cell_edges
from vlmamba.data.scenes.scene import SIDE, Background, Item, Scene
from vlmamba.data.scenes.vocabulary import COLOURS

RGB = tuple[int, int, int]
_TEXTURES = 24
_TICK_PX = 11
_LABEL_PX = 12


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """An RGB picture of `size` by `size`. The same scene gives the same pixels wherever the same fonts are."""
    scale = size / SIDE
    image = _ground(scene.background, size)
    if scene.panel:
        image.paste(scene.panel_colour, tuple(round(v * scale) for v in scene.panel))
    if scene.table:
        _table(image, scene, scale)
    if scene.chart:
        _chart(image, scene, scale)
    for item in scene.items:
        _item(image, item, scale)
    return image


@cache
def _veil(style: str, variant: int, size: int) -> Image.Image:
    """The mask through which a background's second colour shows, twice the picture's size so that it can be shifted."""
    side = 2 * size
    rng = random.Random(f"{style} {variant}")
    if style == "gradient":
        veil = Image.linear_gradient("L").resize((side, side))
        return veil.rotate(90 * (variant % 4))
    if style == "noise":
        grain = (1, 2, 4)[variant % 3]
        cells = Image.frombytes("L", (side // grain, side // grain), rng.randbytes((side // grain) ** 2))
        return cells.resize((side, side), Image.Resampling.NEAREST)
    veil = Image.new("L", (side, side))
    draw = ImageDraw.Draw(veil)
    step = rng.randint(5, 14)
    for at in range(0, 2 * side, step):
        if variant % 4 == 0:
            draw.line((at, 0, at, side), fill=230)
        elif variant % 4 == 1:
            draw.line((0, at, side, at), fill=230)
        elif variant % 4 == 2:
            draw.line((at, 0, at - side, side), fill=230)
        else:
            for y in range(0, side, step):
                draw.rectangle((at, y, at + 1, y + 1), fill=230)
    return veil


def _ground(background: Background, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), background.base)
    if background.style != "plain":
        veil = _veil(background.style, background.variant % _TEXTURES, size)
        x, y = background.variant // 7 % size, background.variant // 91 % size
        if background.style == "gradient":
            x = y = size // 2
        image.paste(background.second, (0, 0), veil.crop((x, y, x + size, y + size)))
    return image


def _item(image: Image.Image, item: Item, scale: float) -> None:
    px = max(1, round(item.px * scale))
    if item.kind == "thing":
        picture = sprites.thing(item.name, px)
        image.paste(picture, _corner(item, picture, scale), picture)
    elif item.kind == "patch":
        image.paste(COLOURS[item.colour], tuple(round(v * scale) for v in item.box))
    else:
        mask = (
            sprites.shape_mask(item.name, item.fill, px)
            if item.kind == "shape"
            else sprites.text_mask(item.text, item.face, px)
        )
        image.paste(COLOURS[item.colour], _corner(item, mask, scale), mask)


def _corner(item: Item, picture: Image.Image, scale: float) -> tuple[int, int]:
    return round(item.x * scale - picture.width / 2), round(item.y * scale - picture.height / 2)


def _ink(scene: Scene) -> RGB:
    return (30, 30, 30) if sum(scene.background.base) > 380 else (238, 238, 238)


def _write(image: Image.Image, text: str, face: int, px: float, x: float, y: float, ink: RGB) -> None:
    """Text with its middle at (x, y), in pixels of the picture."""
    mask = sprites.text_mask(text, face, round(px))
    image.paste(ink, (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


def _table(image: Image.Image, scene: Scene, scale: float) -> None:
    table, ink = scene.table, _ink(scene)
    assert table is not None
    left, top, wide, high = (v * scale for v in cell_edges(table))
    draw = ImageDraw.Draw(image)
    right, bottom = left + wide * table.columns, top + high * table.rows
    for row in range(table.rows + 1):
        draw.line((left, top + high * row, right, top + high * row), fill=ink)
    for column in range(table.columns + 1):
        draw.line((left + wide * column, top, left + wide * column, bottom), fill=ink)
    if table.headed:
        for row in range(table.rows):
            _write(image, str(row + 1), 1, 13 * scale, left / 2, top + high * (row + 0.5), ink)
        for column in range(table.columns):
            _write(image, "ABCD"[column], 1, 13 * scale, left + wide * (column + 0.5), top / 2, ink)


def _chart(image: Image.Image, scene: Scene, scale: float) -> None:
    chart, ink = scene.chart, _ink(scene)
    assert chart is not None
    base = scene.background.base
    faint = tuple((3 * b + i) // 4 for b, i in zip(base, ink))
    strong = tuple((b + i) // 2 for b, i in zip(base, ink))
    left, top, right, bottom = (v * scale for v in (PLOT_LYING if chart.horizontal else PLOT))
    draw = ImageDraw.Draw(image)
    unit = (right - left if chart.horizontal else bottom - top) / TOP
    for value in range(TOP + 1):
        shade = strong if value % 5 == 0 else faint
        at = left + unit * value if chart.horizontal else bottom - unit * value
        draw.line((at, top, at, bottom) if chart.horizontal else (left, at, right, at), fill=shade)
        if value % 5 == 0:
            x, y = (at, bottom + 8 * scale) if chart.horizontal else (left - 9 * scale, at)
            _write(image, str(value), 0, _TICK_PX * scale, x, y, ink)
    step = (bottom - top if chart.horizontal else right - left) / len(chart.values)
    for index, (label, colour, value) in enumerate(zip(chart.labels, chart.colours, chart.values)):
        middle = (top if chart.horizontal else left) + step * (index + 0.5)
        low, high = middle - step * 0.32, middle + step * 0.32
        if chart.horizontal:
            draw.rectangle((left, low, left + unit * value, high), fill=COLOURS[colour])
            _label(image, scene, label, left / 2, middle, min(18.0 * scale, step - 2), ink)
        else:
            draw.rectangle((low, bottom - unit * value, high, bottom), fill=COLOURS[colour])
            _label(image, scene, label, middle, bottom + 10 * scale, min(18.0 * scale, step - 2), ink)
    draw.line((left, top, left, bottom), fill=ink)
    draw.line((left, bottom, right, bottom), fill=ink)


def _label(image: Image.Image, scene: Scene, label: str, x: float, y: float, px: float, ink: RGB) -> None:
    assert scene.chart is not None
    if scene.chart.labelled == "thing":
        picture = sprites.thing(label, round(px))
        image.paste(picture, (round(x - picture.width / 2), round(y - picture.height / 2)), picture)
    else:
        size = _LABEL_PX if scene.chart.labelled == "word" else 13
        _write(image, label, scene.chart.face, size * image.width / SIDE, x, y, ink)
