"""Formats the records of bench.host.run as table rows and as lists of launches."""

import statistics
from collections.abc import Iterable, Sequence

from bench.core import comparison
from bench.core.records import GIB, HostRecord
from bench.host.counts import KINDS, kernels

ENCODE = "encode "  # how the names of these cases begin
HEADINGS = (
    "case",
    "lane",
    "CPU / stock [least, most of a turn]",
    "its parts / stock",
    "wall / stock",
    "launches",
    *KINDS,
    "peak, GiB",
    "peak / stock",
)


def cpu_ratio(record: HostRecord, stock: HostRecord | None) -> float | None:
    """CPU time relative to stock: the median of the ratios per turn. None if either is missing."""
    return _median(_ratios(record.runs, stock and stock.runs))


def part_ratios(record: HostRecord, stock: HostRecord) -> list[float | None]:
    """`cpu_ratio` of each part of a step; empty for a step with one part."""
    if len(record.parts) < 2:
        return []
    return [_median(_ratios(runs, stock.parts.get(part))) for part, runs in record.parts.items()]


def peak_ratio(record: HostRecord, stock: HostRecord | None) -> float | None:
    """Peak memory relative to stock; None if either is missing."""
    if stock is None or not stock.peak_bytes or not record.peak_bytes:
        return None
    return record.peak_bytes / stock.peak_bytes


def is_encode(record: HostRecord) -> bool:
    """Whether the record is of a call of SentenceTransformer.encode."""
    return record.name.startswith(ENCODE)


def rows(records: Iterable[HostRecord]) -> list[Sequence[str]]:
    """One row per lane, under HEADINGS."""
    return [
        _row(record, comparison.baseline(of_case)) for of_case in comparison.by_case(records).values() for record in of_case
    ]


def _row(record: HostRecord, stock: HostRecord | None) -> list[str]:
    counts = [sum(record.launches.get(kind, {}).values()) for kind in KINDS]
    launched = [str(n) for n in (kernels(record.launches), *counts)] if record.launches else [""] * (1 + len(KINDS))
    named = [record.name, record.lane]
    if record.seconds is None or record.wall is None:
        return [*named, comparison.why_not(record), "", "", *launched, "", ""]
    own = record is stock
    ratios = [] if own else _ratios(record.runs, stock and stock.runs)
    return [
        *named,
        f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else "",
        "" if own or stock is None else ", ".join(_two(ratio) for ratio in part_ratios(record, stock)),
        "" if own else _two(_median(_ratios(record.wall_runs, stock and stock.wall_runs))),
        *launched,
        "" if record.peak_bytes is None else f"{record.peak_bytes / GIB:.3f}",
        "" if own else _two(peak_ratio(record, stock)),
    ]


def _ratios(runs: Sequence[float], base: Sequence[float] | None) -> list[float]:
    """Ratios per turn: other load on the machine affects both lanes of a turn."""
    return [a / b for a, b in zip(runs, base or (), strict=False)]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def names(record: HostRecord) -> list[str]:
    """One line per kernel name of one step: count, kind and name, most frequent first."""
    found = [(times, kind, name) for kind, of_kind in record.launches.items() for name, times in of_kind.items()]
    ordered = sorted(found, key=lambda launch: -launch[0])
    return [f"{times:5}  {kind:9}  {name}" for times, kind, name in ordered]
