"""Loss curves as SVG, and as a page: no plotting library; opens anywhere, without a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN, BOTTOM = 420, 260, 52, 42


Runs = Mapping[str, Sequence[Mapping[str, float]]]


def draw_curves(runs: Runs, file: Path) -> None:
    """One panel per run: loss over steps, with its final value; lines come from `read_metrics`."""
    file.write_text(_svg(runs) + "\n")


def write_page(runs: Runs, file: Path) -> None:
    """The curves and every run's last numbers as one HTML file."""
    tables = [
        f"<h2>{escape(name)}</h2><table>"
        + "".join(f"<tr><td>{escape(key)}</td><td>{value:,.6g}</td></tr>" for key, value in lines[-1].items())
        + "</table>"
        for name, lines in runs.items()
        if lines
    ]
    file.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>' + escape(", ".join(runs)) + "</title>"
        "<style>body{font-family:sans-serif;margin:2em}svg{max-width:100%}td{padding:.1em 1em .1em 0}</style></head>"
        f"<body>{_svg(runs)}{''.join(tables)}</body></html>\n",
        encoding="utf-8",
    )


def _svg(runs: Runs) -> str:
    panels = [
        f'<g transform="translate({(i % 2) * WIDTH},{(i // 2) * HEIGHT})">{_panel(name, lines)}</g>'
        for i, (name, lines) in enumerate((n, ls) for n, ls in runs.items() if ls)
    ]
    width, height = WIDTH * min(2, max(1, len(panels))), HEIGHT * max(1, -(-len(panels) // 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(panels)}</svg>"
    )


def _panel(name: str, lines: Sequence[Mapping[str, float]]) -> str:
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    low, high = _nice_range(min(losses), max(losses))
    right, floor = WIDTH - 16, HEIGHT - BOTTOM

    def x(step: float) -> float:
        return MARGIN + (right - MARGIN) * step / max(steps)

    def y(loss: float) -> float:
        return floor - (floor - 34) * (math.log(max(loss, low)) - math.log(low)) / (math.log(high) - math.log(low))

    parts = [f'<text x="{MARGIN}" y="20" font-size="13">{escape(name)}: {losses[-1]:.3f} at step {steps[-1]}</text>']
    for value in _ticks(low, high):
        parts.append(f'<line x1="{MARGIN}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step, anchor in ((0, "start"), (max(steps) // 2, "middle"), (max(steps), "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{floor + 16}" text-anchor="{anchor}">{step:,}</text>')
    parts.append(f'<text x="{(MARGIN + right) / 2:.0f}" y="{floor + 32}" text-anchor="middle">step</text>')
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, losses, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" stroke="#2a6fb0" stroke-width="1.6"/>')
    parts.append(f'<circle cx="{x(steps[-1]):.1f}" cy="{y(losses[-1]):.1f}" r="2.4" fill="#2a6fb0"/>')
    return "".join(parts)


def _nice_range(low: float, high: float) -> tuple[float, float]:
    """A range with room for a logarithmic axis, whatever the values."""
    low = max(low, 1e-6)
    return low * 0.9, max(high, low * 1.2) * 1.1


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten inside the range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
