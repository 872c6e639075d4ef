"""Tables and plots of the finished runs: means, standard errors over seeds, and paired differences from a reference.

A difference is taken seed by seed (same samples in the same order). Its error rests on the spread of such differences,
pooled over all variants: three seeds of one alone would tell little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from xml.sax.saxutils import escape

from studies.ablations.plan import AXES, BY_NAME, CLAIMS, VARIANTS, Claim
from vlmamba.evaluation import TASKS

Row = Mapping[str, Any]
Metric = Callable[[Row], float | None]
TICK = 5
"""Points between two lines of a plot."""
CLEAR = 2.6
"""Errors beyond which a difference is printed in bold: one in a hundred by chance, and there are many comparisons."""


def benchmark(name: str) -> Metric:
    """A benchmark's headline; MME's 2,000 points as percent."""

    def of(row: Row) -> float | None:
        value = row["benchmarks"].get(name, {}).get("score")
        return value if name != "mme" or value is None else value / 20

    return of


def group(*path: str) -> Metric:
    """An accuracy anywhere in a result, by its keys."""

    def of(row: Row) -> float | None:
        here: Any = row
        for key in path:
            here = here.get(key, {})
        return here.get("accuracy")

    return of


def average(names: Sequence[str]) -> Metric:
    """Of some benchmarks."""

    def of(row: Row) -> float | None:
        values = [value for name in names if (value := benchmark(name)(row)) is not None]
        return mean(values) if values else None

    return of


HEADLINES: dict[str, Metric] = {
    **{task.title: benchmark(name) for name, task in TASKS.items()},
    "mean of 8": average(tuple(TASKS)),
    "skills": group("skills", "all"),
}


class Findings:
    """Results by variant and seed."""

    def __init__(self, results: Sequence[Row]):
        self.rows = {(row["variant"], row["seed"]): row for row in results}
        self.names = [v.name for v in VARIANTS if any(name == v.name for name, _ in self.rows)]

    def values(self, name: str, metric: Metric) -> dict[int, float]:
        """By seed."""
        found = {seed: metric(row) for (variant, seed), row in self.rows.items() if variant == name}
        return {seed: value for seed, value in found.items() if value is not None and not math.isnan(value)}

    def differences(self, name: str, metric: Metric, other_name: str | None = None) -> list[float]:
        """From another variant, its reference if not named, seed by seed."""
        own, other = self.values(name, metric), self.values(other_name or BY_NAME[name].reference, metric)
        return [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]

    def spread(self, metric: Metric) -> float | None:
        """Standard deviation of a difference from seed to seed, pooled over variants."""
        squares, freedom = 0.0, 0
        for name in self.names:
            if name != BY_NAME[name].reference and len(of := self.differences(name, metric)) > 1:
                squares += sum((value - mean(of)) ** 2 for value in of)
                freedom += len(of) - 1
        return math.sqrt(squares / freedom) if freedom else None

    def difference(self, name: str, metric: Metric, other: str | None = None) -> tuple[float, float] | None:
        """Mean and standard error."""
        of, spread = self.differences(name, metric, other), self.spread(metric)
        if not of or spread is None or name == (other or BY_NAME[name].reference):
            return None
        return mean(of), spread / math.sqrt(len(of))


def close(results: Sequence[Row], points: float) -> list[str]:
    """Variants whose skills differ by less than so many points from their reference's, or from those of another variant
    that the paper compares them with."""
    found = Findings(results)
    pairs = [(name, BY_NAME[name].reference) for name in found.names] + [(c.better, c.worse) for c in CLAIMS]
    apart = {pair: found.difference(pair[0], HEADLINES["skills"], pair[1]) for pair in pairs}
    near = {name for pair, value in apart.items() if value is not None and abs(value[0]) < points for name in pair}
    return [name for name in found.names if name in near and BY_NAME[name].axis != "all"]


def write(results: Sequence[Row], folder: Path, toy: bool = False) -> Path:
    """study-results.md with its plots; returns the page."""
    found = Findings(results)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "study-results.md"
    page.write_text("\n".join(_lines(found, folder, toy)) + "\n", encoding="utf-8")
    return page


def _lines(found: Findings, folder: Path, toy: bool) -> Iterator[str]:
    devices = sorted({row["versions"]["device"] for row in found.rows.values()})
    seconds = sum(row["train_seconds"] + row["measure_seconds"] for row in found.rows.values())
    yield "# Results of the study"
    yield "\nWritten by `python -m studies.ablations`; [the study](study.md) says what is compared.\n"
    if not found.rows:
        yield "No run is finished."
        return
    if toy:
        yield "**A toy: the command's rehearsal, with models that learned nothing. The numbers mean nothing.**\n"
    scale = next(iter(found.rows.values()))["scale"]
    yield (
        f"{len(found.rows)} runs of {scale['align']:,} + {scale['instruct']:,} steps of {scale['batch']} samples, "
        f"{seconds / 60:.0f} minutes together on {', '.join(devices)}. Means with standard errors over seeds. "
        "Differences from the baseline (or another variant where it says so) are taken seed by seed; their errors are "
        f"from the spread of such differences, pooled over all variants. Bold: more than {CLEAR} errors from nothing. "
        "MME: percent of 2,000 points. MM-Vet, which needs a judge: F1 of the words.\n"
    )
    if given := sorted({part for row in found.rows.values() for part in row["given"]}):
        yield f"Of stage 0, another command trained and this one was given: {', '.join(given)}.\n"
    yield from _missing(found)
    yield "## The paper's words, and these numbers\n"
    yield "| the paper | here | points | clear on | seeds | |"
    yield "|---|---|---|---|---|---|"
    yield from _claims(found, CLAIMS)
    yield (
        f"\nPoints: the difference of the means over the benchmarks named. Clear: more than {CLEAR} standard errors "
        "from nothing. These are models of another size, trained for another time on other pictures: agreement makes "
        "the paper's words no truer at 2.8 billion parameters, and disagreement no less true.\n"
    )
    for axis in AXES:
        names = [n for n in found.names if BY_NAME[n].axis == axis]
        if not names:
            continue
        references = [n for n in found.names if n in {BY_NAME[name].reference for name in names} and n not in names]
        yield f"## {axis}\n"
        yield "; ".join(f"`{name}`: {BY_NAME[name].what}" for name in references + names) + ".\n"
        yield from _table(found, references + names)
        picture = folder / f"study-{axis}.svg"
        picture.write_text(forest(found, names), encoding="utf-8")
        yield f"\n![{axis}: differences from the reference]({picture.name})\n"
        yield from _skills(found, references + names)
    yield from _controls(found)
    yield from _errors(found)


def _missing(found: Findings) -> Iterator[str]:
    """What has fewer seeds than the baseline, and what was not run."""
    seeds = {v.name: sum(name == v.name for name, _ in found.rows) for v in VARIANTS}
    fewer = [f"{name} ({count})" for name, count in seeds.items() if 0 < count < seeds["baseline"]]
    absent = [name for name, count in seeds.items() if not count]
    if fewer:
        yield f"Fewer seeds than the baseline, which has {seeds['baseline']}: {', '.join(fewer)}.\n"
    if absent:
        yield f"Not run: {', '.join(absent)}.\n"


def _claims(found: Findings, claims: Sequence[Claim]) -> Iterator[str]:
    for claim in claims:
        names = [n for n in claim.benchmarks or TASKS if n not in claim.apart]
        of = found.difference(claim.better, average(names), claim.worse)
        each = [found.difference(claim.better, benchmark(n), claim.worse) for n in names]
        clear = [one for one in each if one is not None and _is_clear(one)]
        ahead = sum(value > 0 for value, _ in clear)
        seeds = len(found.differences(claim.better, average(names), claim.worse))
        yield (
            f"| {claim.words} | {claim.better} - {claim.worse}, {_titles(claim)} | {_signed(of)} "
            f"| {ahead} for, {len(clear) - ahead} against, of {len(names)} | {seeds} | {_verdict(claim, of)} |"
        )


def _verdict(claim: Claim, of: tuple[float, float] | None) -> str:
    if of is None:
        return "cannot be told: fewer than two seeds"
    least = f"{CLEAR * of[1]:.1f} points"
    if claim.equal:
        return "disagrees: they differ" if _is_clear(of) else f"agrees: a difference above {least} would have shown"
    if not _is_clear(of):
        return f"cannot be told: only a difference above {least} would have shown"
    return "agrees" if of[0] > 0 else "disagrees: the other is better"


def _titles(claim: Claim) -> str:
    def titles(names: Sequence[str]) -> str:
        return ", ".join(TASKS[name].title for name in names)

    return titles(claim.benchmarks) or ("all eight" if not claim.apart else f"all but {titles(claim.apart)}")


def _is_clear(of: tuple[float, float]) -> bool:
    return abs(of[0]) > CLEAR * of[1]


def _table(found: Findings, names: Sequence[str]) -> Iterator[str]:
    yield "| | parameters | connector | seeds | " + " | ".join(HEADLINES) + " |"
    yield "|---|---|---|---|" + "---|" * len(HEADLINES)
    for name in names:
        row = next(row for (variant, _), row in found.rows.items() if variant == name)
        seeds = sum(variant == name for variant, _ in found.rows)
        cells = [_of_seeds(found.values(name, metric)) for metric in HEADLINES.values()]
        sizes = f"{row['parameters']:,} | {row['connector_parameters']:,}"
        yield f"| {name} | {sizes} | {seeds} | " + " | ".join(cells) + " |"
    for name in names:
        reference = BY_NAME[name].reference
        differences = [found.difference(name, metric) for metric in HEADLINES.values()]
        if not any(differences):
            continue
        yield f"| *{name} - {reference}* | | | | " + " | ".join(map(_signed, differences)) + " |"


def _skills(found: Findings, names: Sequence[str]) -> Iterator[str]:
    skills = list(dict.fromkeys(s for n, _ in found.rows for s in found.rows[n, _]["skills"] if n in names))
    yield "| skill | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for skill in skills:
        cells = [_of_seeds(found.values(name, group("skills", skill))) for name in names]
        yield f"| {skill} | " + " | ".join(cells) + " |"
    yield ""


def _controls(found: Findings) -> Iterator[str]:
    yield "## Controls and the retrieval probe\n"
    columns: dict[str, Metric] = {
        "with the picture": group("controls", "picture"),
        "patches shuffled": group("controls", "shuffled"),
        "no picture": group("controls", "none"),
    }
    for by, title in (("rows", "of {} rows"), ("row", "row {}")):
        keys = sorted({key for row in found.rows.values() for key in row["probe"][by]}, key=int)
        columns |= {title.format(key): group("probe", by, key) for key in keys}
    yield "Skills on the same questions, and accuracy in looking up a row of a table by one of its cells.\n"
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for name in found.names:
        yield f"| {name} | " + " | ".join(_of_seeds(found.values(name, m)) for m in columns.values()) + " |"
    yield ""


def _errors(found: Findings) -> Iterator[str]:
    row = found.rows.get(("baseline", 0))
    if row is None:
        return
    scale = {"mme": 1 / 20}
    cells = [
        f"{TASKS[name].title} {value['error'] * scale.get(name, 1):.1f}"
        for name, value in row["benchmarks"].items()
        if value["error"] is not None
    ]
    yield "## What seeds do not show\n"
    yield (
        "All runs answer the same questions; others would move all of them. The standard error of that, "
        f"in one run of the baseline: {', '.join(cells)}, skills {row['skills']['all']['error']:.1f}. Much of it is "
        "common to two variants and cancels in their difference."
    )


def _of_seeds(values: Mapping[int, float]) -> str:
    of = list(values.values())
    if not of:
        return "-"
    return f"{mean(of):.1f}" + (f" ± {stdev(of) / math.sqrt(len(of)):.1f}" if len(of) > 1 else "")


def _signed(of: tuple[float, float] | None) -> str:
    if of is None:
        return ""
    text = f"{of[0]:+.1f} ± {of[1]:.1f}"
    return f"**{text}**" if _is_clear(of) else text


def forest(found: Findings, names: Sequence[str]) -> str:
    """SVG: one line a headline and variant, its difference with two standard errors to either side. Nine of ten lines
    fit; the others, of scores that vary too much to tell anything, end in an arrow."""
    colours = ("#2a6fb0", "#c97b58", "#6aa36a", "#8a6bb0", "#9a9a9a")
    marks = [
        (row, i, of)
        for row, metric in enumerate(HEADLINES.values())
        for i, name in enumerate(names)
        if (of := found.difference(name, metric)) is not None
    ]
    spans = sorted(abs(value) + 2 * error for *_, (value, error) in marks) or [1.0]
    reach = max(TICK, TICK * math.ceil(spans[int(0.9 * (len(spans) - 1))] / TICK))
    step, left, width = 8 * len(names) + 12, 110, 560
    height = 30 + step * len(HEADLINES) + 34

    def x(value: float) -> float:
        return left + width / 2 * (1 + max(-1.0, min(1.0, value / reach)))

    parts = ['<rect width="100%" height="100%" fill="white"/>']
    place = float(left)
    for i, name in enumerate(names):
        parts.append(f'<rect x="{place:.0f}" y="9" width="10" height="10" fill="{colours[i % 5]}"/>')
        parts.append(f'<text x="{place + 14:.0f}" y="18">{escape(name)}</text>')
        place += 30 + 6.5 * len(name)
    for tick in range(-reach, reach + 1, TICK):
        line = f'x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="28" y2="{height - 32}"'
        parts.append(f'<line {line} stroke="{"#555" if tick == 0 else "#ddd"}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 18}" text-anchor="middle">{tick:+}</text>')
    legend = "points and two standard errors; arrows: further"
    parts.append(f'<text x="{x(0):.1f}" y="{height - 4}" text-anchor="middle">{legend}</text>')
    for row, title in enumerate(HEADLINES):
        parts.append(f'<text x="{left - 8}" y="{30 + step * row + step / 2 + 4:.1f}" text-anchor="end">{title}</text>')
    for row, i, (value, error) in marks:
        y = 30 + step * row + 10 + 8 * i
        low, high = value - 2 * error, value + 2 * error
        ends = f'x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"'
        parts.append(f'<line {ends} stroke="{colours[i % 5]}" stroke-width="2"/>')
        for end in (e for e in (low, high) if abs(e) > reach):
            tip, away = x(end), math.copysign(6, end)
            parts.append(f'<path d="M{tip:.1f} {y - 4}l{away} 4l{-away} 4z" fill="{colours[i % 5]}"/>')
        if abs(value) <= reach:
            parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="3" fill="{colours[i % 5]}"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 30}" height="{height}" '
        f'viewBox="0 0 {left + width + 30} {height}" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>\n'
    )
