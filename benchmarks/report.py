"""Rows of measurements, and what they are written to: JSON for programs, tables for people.

A file is written after each section, so that a run that is cut short keeps what it had. A later run of some sections
replaces those and leaves the others; each says which commit it was made from, and when. Rows that a shorter run does
not come to stay, under the commit that they were measured at.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.aims import AIMS
from benchmarks.timing import Timing

OURS, LIMITS, MISSING = "vlmamba", "measured limits", "missing"
_MARK = re.compile(r"\bcommit \S+$")


@dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
        section: "scan", "decode", ...; case: what was run, e.g. "forward, B16 D5120 L1024".
        who: "vlmamba" or a peer's name; mode: how it was run: "eager", "graph", "compiled", "bf16", ...
        value, low, high: median and quartiles, in `unit`; None when there is no number, `note` then says why.
        fraction: of the machine's limit named by `limit`, 0 to 1.
        shape: numbers that plots need: batch, length, ...
    """

    section: str
    case: str
    who: str
    mode: str
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    fraction: float | None = None
    limit: str = ""
    note: str = ""
    shape: dict[str, float] = field(default_factory=dict)


def timed(timing: Timing, work: float | None = None) -> dict[str, float]:
    """value, low, high of a row in ms; with `work` (tokens or operations a call), in work per second."""
    if work is None:
        return {"value": timing.median, "low": timing.low, "high": timing.high}
    return {"value": work / timing.median * 1e3, "low": work / timing.high * 1e3, "high": work / timing.low * 1e3}


class Report:
    """All rows of one machine.

    Attributes:
        about: by section, what is measured, and how. made: by section, "commit", "date" and the machine's "limits" that
            its rows are held against, of the run that they come from. seconds: by section, what that took.
    """

    def __init__(self, path: Path, machine: dict[str, Any]):
        self.path, self.machine = path, machine
        self.rows: list[Row] = []
        self.seconds: dict[str, float] = {}
        self.about: dict[str, str] = {}
        self.made: dict[str, dict[str, str]] = {}
        self._kept: list[Row] = []  # of the sections begun: what an earlier run measured of them
        self._known = False  # whether that was on the hardware that is here now
        if path.with_suffix(".json").exists():
            stored = json.loads(path.with_suffix(".json").read_text())
            self.rows = [Row(**row) for row in stored["rows"]]
            self.seconds, self.about, self.made = stored["seconds"], stored["about"], stored.get("made", {})
            self.machine = {**stored["machine"], **machine}
            self._known = stored["machine"].get("name") == machine.get("name")

    def start(self, section: str) -> None:
        """Marks an earlier run's rows of this section with its commit, and notes of which run the next ones are."""
        before, now = (str(of.get("commit", "unknown")) for of in (self.made.get(section, {}), self.machine))
        earlier = [row for row in self.rows if row.section == section and self._known and _measured(row)]
        self._kept += earlier if before == now else [_marked(row, before) for row in earlier]
        self.rows = [row for row in self.rows if row.section != section]
        self.rows += [row for row in self._kept if row.section == section]
        self.about[section], self.seconds[section] = "", 0.0
        self.made[section] = {name: str(self.machine.get(name, "")) for name in ("commit", "date", LIMITS)}

    def add(self, row: Row) -> Row:
        """Puts a row in, in the place of an earlier run's."""
        replaced = [old for old in self._kept if _key(old) == _key(row)]
        self._kept = [old for old in self._kept if old not in replaced]
        self.rows = [old for old in self.rows if old not in replaced] + [row]
        return row

    def end(self, sections: set[str]) -> None:
        """Forgets an earlier run's rows of the sections of which this run left nothing out: they are of cases that
        there are no more."""
        short = {row.section for row in self.rows if row.mode == MISSING}
        self.rows = [row for row in self.rows if row.section not in sections - short or row not in self._kept]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(row) for row in self.rows]
        parts = {"machine": self.machine, "made": self.made, "about": self.about, "seconds": self.seconds}
        stored = parts | {"rows": rows}
        _replace(self.path.with_suffix(".json"), json.dumps(stored, indent=1) + "\n")
        _replace(self.path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.machine.get('name', self.path.stem)}", ""]
        lines += [f"* {key}: {value}" for key, value in self.machine.items() if key != "name"]
        for section in dict.fromkeys(row.section for row in self.rows):
            rows = [row for row in self.rows if row.section == section]
            origin = self._origin(section, any(_MARK.search(row.note) for row in rows))
            lines += ["", f"## {section}", "", self.about.get(section, ""), "", *origin, *_table(rows)]
        return "\n".join(lines) + "\n"

    def _origin(self, section: str, mixed: bool) -> list[str]:
        """Which run the rows come from (`mixed`: not all); the limits too where they are not those at the top."""
        made = self.made.get(section, {})
        if not made.get("commit"):
            return []
        others = made.get(LIMITS, "") if made.get(LIMITS) != self.machine.get(LIMITS) else ""
        mixture = " Rows that name a commit are of an earlier run, held against its limits." if mixed else ""
        return [f"Commit {made['commit']}, {made['date']}{f'; limits: {others}' if others else ''}.{mixture}", ""]


def _key(row: Row) -> tuple[str, ...]:
    return (row.section, row.case, row.who, row.mode, row.unit)


def _measured(row: Row) -> bool:
    """Whether a row says something of the hardware: a number, or that memory did not suffice."""
    return row.mode != MISSING and not row.note.startswith("failed")


def _marked(row: Row, commit: str) -> Row:
    if _MARK.search(row.note):
        return row
    return replace(row, note=", ".join(filter(None, [row.note, f"commit {commit}"])))


def _table(rows: list[Row]) -> list[str]:
    aims = AIMS if any(row.case in AIMS for row in rows) else {}
    heads = ["", "who", "mode", "median", "quartiles", "of the limit", "against vlmamba", *["aim"] * bool(aims)]
    lines = [_line(heads), "|" + "---|" * len(heads)]
    cases = list(dict.fromkeys(row.case for row in rows))
    unmeasured: dict[str, list[str]] = {}  # by reason
    for row in sorted(rows, key=lambda row: cases.index(row.case)):
        if row.value is None:
            unmeasured.setdefault(row.note, []).append(f"{row.case} ({row.who})")
            continue
        low_high = f"{number(row.low)} to {number(row.high)}" if row.low is not None and row.low != row.high else ""
        fraction = f"{row.fraction:.0%} {row.limit}".strip() if row.fraction is not None else ""
        note = f" ({row.note})" if row.note else ""
        ours = _ours(row, rows)
        cells = [row.case, row.who, row.mode + note, f"{number(row.value)} {row.unit}", low_high, fraction]
        best = row.who == OURS and row.value == _best(row, rows)
        lines.append(_line([*cells, _against(row, ours), *[aims.get(row.case, "") * best] * bool(aims)]))
    for reason, found in unmeasured.items():
        lines += ["", f"No number, {reason}: {'; '.join(dict.fromkeys(found))}."]
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ours(row: Row, rows: list[Row]) -> float | None:
    """What vlmamba does in the same case, run the same way if it was, else its best."""
    same = [r for r in rows if r.mode == row.mode]
    return _best(row, same) or _best(row, rows)


def _best(row: Row, rows: list[Row]) -> float | None:
    """vlmamba's best number in the case of this row."""
    found = [r.value for r in rows if (r.who, r.case, r.unit) == (OURS, row.case, row.unit)]
    better = max if _more_is_better(row.unit) else min
    return better((value for value in found if value is not None), default=None)


def _against(row: Row, ours: float | None) -> str:
    if ours is None or row.who == OURS or not row.value or not ours:
        return ""
    if row.unit in ("GiB", "MiB"):
        return f"{row.value / ours:.2f} x the memory"
    times = ours / row.value if _more_is_better(row.unit) else row.value / ours
    return f"{times:.2f} x slower" if times >= 1 else f"{1 / times:.2f} x faster"


def _more_is_better(unit: str) -> bool:
    return unit.endswith("/s") or unit == "x"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
