"""The report's pictures, drawn with Pillow: what each model does as the sequence or the batch grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import Row, number

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 520, 90, 50, 30, 60
SCALE = 2
COLOURS = {"vlmamba": "#c0392b", "mamba-ssm": "#2a6fb0", "Transformer": "#2e8b57"}
OTHERS = ("#8e5ea2", "#b8860b", "#555555", "#008b8b")

Line = list[tuple[float, float]]


def draw(rows: Sequence[Row], file: Path) -> None:
    """One panel per question that the rows can answer; nothing if there is none."""
    panels = [(title, axis, unit, lines) for title, axis, unit, lines in _questions(rows) if lines]
    if not panels:
        return
    columns = min(2, len(panels))
    size = (WIDTH * columns * SCALE, HEIGHT * -(-len(panels) // columns) * SCALE)
    image = Image.new("RGB", size, "white")
    for i, panel in enumerate(panels):
        _panel(ImageDraw.Draw(image), (i % columns) * WIDTH, (i // columns) * HEIGHT, *panel)
    image.save(file)


def _questions(rows: Sequence[Row]) -> list[tuple[str, str, str, dict[str, Line]]]:
    def pick(section: str, unit: str, axis: str, batch: float | None = None) -> dict[str, Line]:
        best: dict[str, dict[float, float]] = {}
        for row in rows:
            if (row.section, row.unit) != (section, unit) or not row.value or axis not in row.shape:
                continue
            if (batch is not None and row.shape.get("batch") != batch) or "int8" in row.case:
                continue
            at = best.setdefault(row.who, {})
            x, better = row.shape[axis], max if unit.endswith("/s") else min
            at[x] = better(row.value, at.get(x, row.value))
        return {who: sorted(points.items()) for who, points in best.items() if len(points) > 1}

    return [
        ("Reading a prompt, one sequence", "tokens", "ms", pick("prefill", "ms", "length", 1)),
        ("Generating", "sequences at once", "tokens/s", pick("decode", "tokens/s", "batch")),
        ("Memory of one sequence, above the weights", "tokens", "GiB", pick("memory", "GiB", "length")),
    ]


def _panel(
    pen: ImageDraw.ImageDraw, x0: int, y0: int, title: str, axis: str, unit: str, lines: dict[str, Line]
) -> None:
    points = [point for line in lines.values() for point in line if point[1] > 0]
    if not points:
        return
    x_range, y_range = (_range([p[i] for p in points]) for i in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_range[0]) / math.log(x_range[1] / x_range[0])
        up = math.log(y / y_range[0]) / math.log(y_range[1] / y_range[0])
        return (
            (x0 + LEFT + across * (WIDTH - LEFT - RIGHT)) * SCALE,
            (y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)) * SCALE,
        )

    def write(x: float, y: float, text: str, anchor: str, size: int = 13, fill: str = "#222222") -> None:
        pen.text((x, y), text, fill=fill, font=ImageFont.load_default(size * SCALE), anchor=anchor)

    for y in _ticks(*y_range):
        (left, height), (right, _) = at(x_range[0], y), at(x_range[1], y)
        pen.line([(left, height), (right, height)], fill="#dddddd", width=SCALE)
        write(left - 8 * SCALE, height, number(y), "rm")
    for x in sorted({point[0] for point in points}):
        across, floor = at(x, y_range[0])
        write(across, floor + 8 * SCALE, f"{x / 1024:g}K" if x >= 1024 else f"{x:g}", "mt")
    write((x0 + LEFT) * SCALE, (y0 + 20) * SCALE, f"{title} ({unit})", "lm", 17)
    write((x0 + (LEFT + WIDTH - RIGHT) / 2) * SCALE, (y0 + HEIGHT - 18) * SCALE, axis, "mm")
    spare = iter(OTHERS)
    for i, (who, line) in enumerate(lines.items()):
        colour = COLOURS.get(who) or next(spare, OTHERS[-1])
        places = [at(*point) for point in line if point[1] > 0]
        pen.line(places, fill=colour, width=3 * SCALE, joint="curve")
        for x, y in places:
            pen.ellipse([x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE], fill=colour)
        write((x0 + LEFT + 14) * SCALE, (y0 + TOP + 16 + 20 * i) * SCALE, who, "lm", 14, colour)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.15, max(high * 1.15, low * 10)  # a line that is nearly flat looks flat


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers: the coarsest steps that give three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), [1 + i / 10 for i in range(90)]):
        ticks = [m * 10.0**e for e in powers for m in steps if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    return ticks
