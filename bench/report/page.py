"""Renders the HTML page: one file with embedded pictures, readable in a browser without a network."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from bench.core import ceilings, comparison
from bench.core.records import ModelRecord, Results
from bench.report import tables
from bench.report.figures import FIGURES

STYLE = """
:root { --ink: #1d2733; --soft: #66707a; --line: #e3e7eb; --back: #f6f7f9; --card: #fff; --ours: #d1495b; --good: #2f7d55 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #98a3ae; --line: #2b343d; --back: #14191e; --card: #1c2329; --good: #7cc7a0 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 80px }
h1 { font-size: 30px; margin: 0; letter-spacing: -.02em } h2 { font-size: 20px; margin: 44px 0 12px }
p, .soft { color: var(--soft) } p { margin: 6px 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 24px 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px }
.card b { display: block; font-size: 26px; font-variant-numeric: tabular-nums } .card.slower b { color: var(--ours) }
.card.faster b { color: var(--good) } .card span { color: var(--soft); font-size: 13px; display: block }
.warn { background: var(--ours); color: #fff; border-radius: 8px; padding: 10px 14px; margin: 16px 0 }
figure { margin: 0 0 18px; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px }
figure img { width: 100%; height: auto; display: block }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap }
.number { text-align: right }
td:has(.long) { white-space: normal; min-width: 260px }
tr.ours { background: color-mix(in srgb, var(--ours) 9%, transparent) } thead th { color: var(--soft); font-weight: 600 }
details { margin: 14px 0 } summary { cursor: pointer; font-weight: 600; padding: 6px 0 }
pre { white-space: pre-wrap; font-size: 12px; color: var(--soft) }
"""

SECTIONS = {
    "lanes": "Models",
    "latencies": "Latency of requests",
    "encode": "Sentence embeddings, end to end",
    "ceilings": "What this machine can do",
    "tests": "Correctness in the same run",
    "breakdown": "Where a step goes",
    "losses": "Losses of the lanes",
    "models": "Every model, every lane",
    "ops": "Every op, every lane",
    "host": "The host: time, launches and memory of a step",
    "tuning": "Tuning",
    "stages": "What was run",
    "environment": "The machine",
}
CARDS = ("fastbert", "fastbert, graphed", "fastbert, graphed step")
OPEN = ("lanes", "latencies", "ceilings", "tests")


def render(results: Results, pictures: Iterable[Path]) -> str:
    """Render the whole page."""
    images = "\n".join(_figure(path) for path in pictures)
    sections = "\n".join(_section(name, title, results) for name, title in SECTIONS.items())
    failures = "\n".join(
        f"<pre>{escape(s.name)}\n{escape(s.reason)}</pre>" for s in results.stages if s.status == "error" and s.reason
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastbert: benchmark report</title><style>{STYLE}</style></head><body><main>
<h1>fastbert</h1>
<p>{escape(tables.provenance(results))}</p>
{_warning(results)}
<div class="cards">{_cards(results)}</div>
<p>Two lanes count as different only if their quartiles do not overlap. Speeds count real tokens, never padding.
Every time except the host's comes after a passed check of the same lane.</p>
{images}
{sections}
<details><summary>Failed jobs, with the end of their output</summary>{failures or "<p>none</p>"}</details>
</main></body></html>
"""


def _warning(results: Results) -> str:
    if results.invented:
        return '<div class="warn">Invented sample numbers: this page shows only its layout.</div>'
    if results.dry_run:
        return '<div class="warn">Dry run on tiny shapes without a GPU: nothing was timed.</div>'
    return ""


def _cards(results: Results) -> str:
    """fastbert and its CUDA graphs against stock, for the first six workloads, and the two ceilings."""
    cards, found = [], [list(records) for records in comparison.by_case(results.models).values()]
    both = [records for records in found if {"fastbert", "stock"} <= {record.lane for record in records}]
    for records in both[:6]:
        named = {record.lane: record for record in records}
        cards += [_card(named[lane], named["stock"]) for lane in CARDS if lane in named]
    for name in (ceilings.COPY, ceilings.PRODUCT):
        measured = results.ceiling(name)
        unit = "TB/s" if name == ceilings.COPY else "TFLOP/s"
        value = f"{measured / 1e12:.3g} {unit}" if measured else comparison.NOT_MEASURED
        cards.append(f'<div class="card"><b>{value}</b><span>{name}, measured ceiling</span></div>')
    return "".join(cards)


def _card(ours: ModelRecord, stock: ModelRecord) -> str:
    if ours.seconds is None or stock.seconds is None:
        text, kind = comparison.NOT_MEASURED, ""
    elif not ours.seconds.differs(stock.seconds):
        text, kind = "no difference", ""
    else:
        times = stock.seconds.median / ours.seconds.median
        text, kind = f"{times:.2f}x", "faster" if times > 1 else "slower"
    what = escape(tables.workload(ours))
    against = f"{ours.lane} against stock (SDPA, fused AdamW)"
    return f'<div class="card {kind}"><b>{text}</b><span>{against}</span><span>{what}</span></div>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    title = escape(FIGURES[path.stem][0])
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def _section(name: str, title: str, results: Results) -> str:
    body = tables.TABLES[name](results).html()
    opened = " open" if name in OPEN else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{body}</details>"
