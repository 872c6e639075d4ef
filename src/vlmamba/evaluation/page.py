"""The report's HTML: no file but itself, no script from elsewhere, readable in light and dark and on paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from vlmamba.evaluation.results import brief

if TYPE_CHECKING:
    from vlmamba.evaluation.report import Card, Section, Share

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --soft: #67727a; --line: #dde2e5; --paper: #fff; --tint: #f5f7f8;
  --right: #1a7f4b; --wrong: #b3372f; --bar: #3b6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9eb; --soft: #98a3ab; --line: #333b41; --paper: #14181b;
  --tint: #1c2226; --right: #53c389; --wrong: #ef7f75; --bar: #79a8e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
a { color: var(--bar); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; }
td.n, th.n { text-align: right; }
.big { font-size: 2.2rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr auto; gap: .35rem .9rem; align-items: center;
  font-size: .92rem; }
.bars svg { width: 100%; height: 18px; display: block; }
.tools { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 1rem; }
.tools button, .tools select { font: inherit; font-size: .9rem; padding: .25rem .7rem; border: 1px solid var(--line);
  border-radius: 1rem; background: var(--paper); color: var(--ink); cursor: pointer; }
.tools button[aria-pressed=true] { background: var(--ink); color: var(--paper); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; background: var(--tint);
  display: flex; flex-direction: column; font-size: .9rem; }
.card img { width: 100%; height: 11rem; object-fit: contain; background: var(--paper); }
.card > div { padding: .7rem .9rem .9rem; } .card[hidden] { display: none; }
.q { white-space: pre-line; overflow-wrap: anywhere; max-height: 9rem; overflow: auto; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .7rem; margin: .6rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
.mark { font-weight: 650; } .right { color: var(--right); } .wrong { color: var(--wrong); }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { overflow: auto; max-height: 24rem; padding: .9rem; background: var(--tint); border-radius: .5rem;
  font-size: .8rem; }
@media print { .tools, details { display: none; } .card { break-inside: avoid; } }
"""

_SCRIPT = """
for (const box of document.querySelectorAll('.browser')) {
  const cards = [...box.querySelectorAll('.card')], buttons = [...box.querySelectorAll('button')];
  const skill = box.querySelector('select');
  let mark = 'all';
  const show = () => cards.forEach(c => {
    c.hidden = (mark !== 'all' && c.dataset.mark !== mark) || (skill && skill.value && c.dataset.skill !== skill.value);
  });
  buttons.forEach(b => b.addEventListener('click', () => {
    mark = b.dataset.mark; buttons.forEach(o => o.setAttribute('aria-pressed', o === b)); show();
  }));
  if (skill) skill.addEventListener('change', show);
}
"""


def render(name: str, sections: Sequence[Section], other: str | None) -> str:
    body = [_head(name, sections, other), _overview(sections, other)]
    body += [_section(section, name, other) for section in sections]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: evaluation</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _head(name: str, sections: Sequence[Section], other: str | None) -> str:
    run: Mapping[str, Any] = sections[0].result["run"]
    facts = [f"{key} {run[key]}" for key in ("model", "weights", "decoding", "predictions") if run.get(key)]
    facts += [sections[0].result["software"], sections[0].result["finished"]]
    beside = f'<p class="soft">compared with {escape(other)}</p>' if other else ""
    return f'<h1>{escape(name)}</h1><p class="soft">{escape(" · ".join(map(str, facts)))}</p>{beside}'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _overview(sections: Sequence[Section], other: str | None) -> str:
    rows, published = [], any(section.result["paper"] is not None for section in sections)
    for section in sections:
        r, s = section.result, section.share
        right = f"{s.mean:.1f} % [{s.low:.1f}, {s.high:.1f}]" if s else "–"
        paper = f'<td class="n">{_number(r["paper"])}</td>' if published else ""
        beside = f'<td class="n">{_beside(section)}</td>' if other else ""
        rows.append(
            f'<tr><td><a href="#{r["task"]}">{escape(r["title"])}</a></td><td>{escape(r["metric"])}</td>'
            f'<td class="n"><b>{_number(r["headline"])}</b></td>{beside}{paper}'
            f'<td class="n">{right}</td><td class="n">{r["coverage"]["answered"]:,}</td></tr>'
        )
    return (
        '<table><thead><tr><th>benchmark</th><th>metric</th><th class="n">score</th>'
        + (f'<th class="n">{escape(other)} (difference)</th>' if other else "")
        + ('<th class="n">VL-Mamba 2.8b</th>' if published else "")
        + '<th class="n">right, 95 % interval</th><th class="n">answers</th></tr></thead><tbody>'
        + "".join(rows)
        + "</tbody></table>"
    )


def _beside(section: Section) -> str:
    """The other run's score, and by how much this one is above it."""
    mine, theirs = section.result["headline"], section.beside
    return _number(theirs) + ("" if mine is None or theirs is None else f" ({mine - theirs:+.1f})")


def _section(section: Section, name: str, other: str | None) -> str:
    r = section.result
    parts = [f'<h2 id="{r["task"]}">{escape(r["title"])}</h2>']
    score = "not scored" if r["headline"] is None else _number(r["headline"])
    error = r.get("standard_error")
    about = "" if error is None else f" ± {_number(error)} (standard error, pictures drawn at random)"
    parts.append(f'<p><span class="big">{score}</span> <span class="soft">{escape(r["metric"] + about)}</span></p>')
    asked = f"task version {r['task_version']}"
    if r["run"].get("variant"):
        asked += f", prompt variant {r['run']['variant']}"
    counts = ", ".join(f"{v:,} {k}" for k, v in r["coverage"].items() if v or k in ("questions", "answered"))
    parts.append(f'<p class="soft">{escape(asked)}; {escape(counts)}</p>')
    parts += [f"<p>Note: {escape(note)}.</p>" for note in r["notes"]]
    if section.share and len(section.skills) > 1:
        parts.append(_bars([*section.skills[:24]], section.share))
    if section.comparison is not None and other is not None:
        parts.append(_comparison(section, name, other))
    if section.cards:
        parts.append("<h3>A sample of the answers</h3>" + _browser(section.cards))
    numbers = escape(json.dumps(brief(r["metrics"]), indent=1, ensure_ascii=False))
    parts.append(f"<details><summary>all numbers</summary><pre>{numbers}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def _bars(skills: Sequence[Share], total: Share) -> str:
    rows = [_bar(skill) for skill in [*skills, total]]
    return f'<h3>By skill, with 95 % intervals ({escape(total.method)})</h3><div class="bars">{"".join(rows)}</div>'


def _bar(share: Share) -> str:
    whisker = (
        f'<line x1="{share.low:.2f}%" x2="{share.high:.2f}%" y1="9" y2="9" stroke="var(--ink)" stroke-width="1.5"/>'
        f'<line x1="{share.low:.2f}%" x2="{share.low:.2f}%" y1="5" y2="13" stroke="var(--ink)" stroke-width="1.5"/>'
        f'<line x1="{share.high:.2f}%" x2="{share.high:.2f}%" y1="5" y2="13" stroke="var(--ink)" stroke-width="1.5"/>'
    )
    words = f"{share.mean:.1f} % of {share.count}, {share.low:.1f} to {share.high:.1f}"
    return (
        f'<span>{escape(share.name)}</span><svg role="img" aria-label="{escape(share.name)}: {words}">'
        '<rect width="100%" height="14" y="2" rx="3" fill="var(--line)"/>'
        f'<rect width="{share.mean:.2f}%" height="14" y="2" rx="3" fill="var(--bar)"/>{whisker}</svg>'
        f'<span class="soft">{share.mean:.1f} % of {share.count:,}</span>'
    )


def _comparison(section: Section, name: str, other: str) -> str:
    test = section.comparison
    assert test is not None
    words = "may well be chance" if test.p >= 0.05 else "is hardly chance"
    first, second = escape(name), escape(other)
    text = (
        f"<h3>Against {second}, question by question</h3>"
        f'<table><tbody><tr><td>both right</td><td class="n">{test.both:,}</td></tr>'
        f'<tr><td>only {first} right</td><td class="n">{test.first_only:,}</td></tr>'
        f'<tr><td>only {second} right</td><td class="n">{test.second_only:,}</td></tr>'
        f'<tr><td>neither</td><td class="n">{test.neither:,}</td></tr></tbody></table>'
        f"<p>McNemar's exact test: p = {test.p:.2g}. The difference {words}.</p>"
    )
    return text + (_browser(section.differences) if section.differences else "")


def _browser(cards: Sequence[Card]) -> str:
    marks = [("all", "all"), ("wrong", "wrong"), ("right", "right")]
    buttons = "".join(
        f'<button type="button" data-mark="{m}" aria-pressed="{"true" if m == "all" else "false"}">{label}</button>'
        for m, label in marks
    )
    skills = sorted({card.skill for card in cards})
    choices = "".join(f"<option>{escape(skill)}</option>" for skill in skills)
    select = f'<select aria-label="skill"><option value="">every skill</option>{choices}</select>'
    tools = buttons + (select if len(skills) > 1 else "")
    shown = "".join(map(_card, cards))
    return f'<div class="browser"><div class="tools">{tools}</div><div class="cards">{shown}</div></div>'


def _mark(score: float | None) -> str:
    return "unjudged" if score is None else "right" if score >= 0.5 else "wrong"


def _card(card: Card) -> str:
    mark = _mark(card.score)
    part = f" ({card.score:.2g})" if card.score is not None and card.score not in (0.0, 1.0) else ""
    picture = (
        f'<img loading="lazy" alt="picture of question {escape(card.id)}" src="{card.picture}">' if card.picture else ""
    )
    lines = [("answer", card.text), ("truth", card.target)]
    if card.parsed and card.parsed != card.text:
        lines.insert(1, ("read as", card.parsed))
    if card.other is not None:
        lines.append(("other run", f"{card.other[0]} ({_mark(card.other[1])})"))
    table = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in lines)
    return (
        f'<article class="card" data-mark="{mark}" data-skill="{escape(card.skill)}">{picture}<div>'
        f'<span class="mark {mark}">{mark}{part}</span> <span class="soft">{escape(card.id)}</span>'
        f'<div class="q">{escape(card.prompt)}</div><dl>{table}</dl></div></article>'
    )
