"""Drawing a symbolic scene with Pillow, at any size, and telling what was drawn where."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from vlmamba.data.scenes import sprites
from vlmamba.data.scenes.marks import BAR_ENDS, Mark
from vlmamba.data.scenes.pages import PLOT, PLOT_LYING, TOP, cell_edges
from vlmamba.data.scenes.scene import SIDE, Background, Item, Scene
from vlmamba.data.scenes.vocabulary import COLOURS, written_size

RGB = tuple[int, int, int]
_TEXTURES = 24
_TICK_PX = 11
_LABEL_PX = 12
_HEAD_PX = 13


def render(scene: Scene, size: int = SIDE, marks: list[Mark] | None = None) -> Image.Image:
    """An RGB picture of `size` by `size`. The same scene gives the same pixels wherever the same fonts are.

    To `marks` is added what was drawn and where, in the order of drawing.
    """
    canvas = _Canvas(_ground(scene.background, size), size / SIDE, marks)
    if scene.panel:
        canvas.pixels.paste(scene.panel_colour, tuple(round(v * canvas.scale) for v in scene.panel))
    if scene.table:
        _table(canvas, scene)
    if scene.chart:
        _chart(canvas, scene)
    for item in scene.items:
        _item(canvas, item)
    return canvas.image


class _Canvas:
    """A picture and the account of what is drawn on it. Places are middles, in pixels of the picture."""

    def __init__(self, image: Image.Image, scale: float, marks: list[Mark] | None) -> None:
        self.image, self.scale, self.marks = image, scale, marks
        self.pixels = image.im  # pasted into as they are: Image.paste takes as long to look at what it is given

    def thing(self, name: str, px: int, x: float, y: float, size: str = "") -> None:
        picture = sprites.thing(name, px)
        box = self._box(picture, x, y)
        self.pixels.paste(picture.im, box, picture.im)
        if self.marks is not None:
            self.marks.append(Mark(name, box, size=size, cover=sprites.thing_cover(name, px)))

    def shape(self, item: Item, px: int, x: float, y: float) -> None:
        mask = sprites.shape_mask(item.name, item.fill, px)
        box = self._box(mask, x, y)
        self.pixels.paste(COLOURS[item.colour], box, mask.im)
        if self.marks is not None:
            cover = sprites.shape_cover(item.name, px)
            self.marks.append(Mark(item.name, box, item.colour, item.fill, item.size, cover))

    def patch(self, colour: str, box: tuple[int, int, int, int]) -> None:
        """A rectangle, right and bottom edge not included."""
        self.pixels.paste(COLOURS[colour], box)
        if self.marks is not None:
            cover = np.ones((box[3] - box[1], box[2] - box[0]), bool)
            self.marks.append(Mark("patch", box, colour, cover=cover))

    def write(self, text: str, face: int, px: int, x: float, y: float, ink: RGB, colour: str) -> None:
        mask = sprites.text_mask(text, face, px)
        box = self._box(mask, x, y)
        self.pixels.paste(ink, box, mask.im)
        if self.marks is not None:
            size = written_size(px / self.scale)
            edges = [box[0] + edge for edge in sprites.character_edges(text, face, px)]
            for character, (start, end) in zip(text.lower(), pairwise(edges)):
                if character != " ":
                    self.marks.append(Mark(character, (start, box[1], end, box[3]), colour, size=size))

    @staticmethod
    def _box(picture: Image.Image, x: float, y: float) -> tuple[int, int, int, int]:
        width, height = picture.size
        left, top = round(x - width / 2), round(y - height / 2)
        return left, top, left + width, top + height


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
    """The veil's 256 levels are blended once and looked up: far fewer than there are pixels."""
    if background.style == "plain":
        return Image.new("RGB", (size, size), background.base)
    veil = _veil(background.style, background.variant % _TEXTURES, size)
    x, y = background.variant // 7 % size, background.variant // 91 % size
    if background.style == "gradient":
        x = y = size // 2
    shades = Image.new("RGB", (256, 1), background.base)
    shades.paste(background.second, (0, 0), _levels())
    ground = veil.crop((x, y, x + size, y + size))
    ground.putpalette(shades.tobytes())
    return ground.convert("RGB")


@cache
def _levels() -> Image.Image:
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def _item(canvas: _Canvas, item: Item) -> None:
    px, x, y = max(1, round(item.px * canvas.scale)), item.x * canvas.scale, item.y * canvas.scale
    if item.kind == "thing":
        canvas.thing(item.name, px, x, y, item.size)
    elif item.kind == "patch":
        left, top, right, bottom = (round(v * canvas.scale) for v in item.box)
        canvas.patch(item.colour, (left, top, right, bottom))
    elif item.kind == "shape":
        canvas.shape(item, px, x, y)
    else:
        canvas.write(item.text, item.face, px, x, y, COLOURS[item.colour], item.colour)


def _ink(scene: Scene) -> tuple[str, RGB]:
    """The colour that lines and their labels have on this ground, and its name."""
    return ("black", (30, 30, 30)) if sum(scene.background.base) > 380 else ("white", (238, 238, 238))


def _table(canvas: _Canvas, scene: Scene) -> None:
    table, (colour, ink), scale = scene.table, _ink(scene), canvas.scale
    assert table is not None
    left, top, wide, high = (v * scale for v in cell_edges(table))
    draw = ImageDraw.Draw(canvas.image)
    right, bottom = left + wide * table.columns, top + high * table.rows
    for row in range(table.rows + 1):
        draw.line((left, top + high * row, right, top + high * row), fill=ink)
    for column in range(table.columns + 1):
        draw.line((left + wide * column, top, left + wide * column, bottom), fill=ink)
    if table.headed:
        px = round(_HEAD_PX * scale)
        for row in range(table.rows):
            canvas.write(str(row + 1), 1, px, left / 2, top + high * (row + 0.5), ink, colour)
        for column in range(table.columns):
            canvas.write("ABCD"[column], 1, px, left + wide * (column + 0.5), top / 2, ink, colour)


def _chart(canvas: _Canvas, scene: Scene) -> None:
    chart, (colour, ink), scale = scene.chart, _ink(scene), canvas.scale
    assert chart is not None
    base = scene.background.base
    faint = tuple((3 * b + i) // 4 for b, i in zip(base, ink))
    strong = tuple((b + i) // 2 for b, i in zip(base, ink))
    left, top, right, bottom = (v * scale for v in (PLOT_LYING if chart.horizontal else PLOT))
    draw = ImageDraw.Draw(canvas.image)
    unit = (right - left if chart.horizontal else bottom - top) / TOP
    for value in range(TOP + 1):
        shade = strong if value % 5 == 0 else faint
        at = left + unit * value if chart.horizontal else bottom - unit * value
        draw.line((at, top, at, bottom) if chart.horizontal else (left, at, right, at), fill=shade)
        if value % 5 == 0:
            x, y = (at, bottom + 8 * scale) if chart.horizontal else (left - 9 * scale, at)
            canvas.write(str(value), 0, round(_TICK_PX * scale), x, y, ink, colour)
    step = (bottom - top if chart.horizontal else right - left) / len(chart.values)
    for index, (label, hue, value) in enumerate(zip(chart.labels, chart.colours, chart.values)):
        middle = (top if chart.horizontal else left) + step * (index + 0.5)
        low, high = middle - step * 0.32, middle + step * 0.32
        length, room = unit * value, min(18.0 * scale, step - 2)
        if chart.horizontal:
            _bar(canvas, hue, value, (left, low, left + length, high), horizontal=True)
            _label(canvas, scene, label, left / 2, middle, room)
        else:
            _bar(canvas, hue, value, (low, bottom - length, high, bottom), horizontal=False)
            _label(canvas, scene, label, middle, bottom + 10 * scale, room)
    draw.line((left, top, left, bottom), fill=ink)
    draw.line((left, bottom, right, bottom), fill=ink)


def _bar(canvas: _Canvas, colour: str, value: int, box: tuple[float, float, float, float], horizontal: bool) -> None:
    """A bar, whose length its end tells: the last two pixels of it."""
    left, top, right, bottom = box
    ImageDraw.Draw(canvas.image).rectangle(box, fill=COLOURS[colour])
    if canvas.marks is not None:
        cover = np.ones((int(bottom) - int(top) + 1, int(right) - int(left) + 1), bool)
        canvas.marks.append(Mark("bar", box, colour, cover=cover, centred=False))
        end = (right - 2, top, right, bottom) if horizontal else (left, top, right, top + 2)
        canvas.marks.append(Mark(BAR_ENDS[value - 1], end, colour))


def _label(canvas: _Canvas, scene: Scene, label: str, x: float, y: float, px: float) -> None:
    assert scene.chart is not None
    if scene.chart.labelled == "thing":
        canvas.thing(label, round(px), x, y)
    else:
        size = round((_LABEL_PX if scene.chart.labelled == "word" else _HEAD_PX) * canvas.scale)
        colour, ink = _ink(scene)
        canvas.write(label, scene.chart.face, size, x, y, ink, colour)
