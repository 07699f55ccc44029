"""Builds the tables of `python -m bench tune`: the best of each entry or, without a GPU, the audit of each candidate."""

from rich.table import Table

from bench.core.comparison import ratio
from bench.core.records import TuneRecord
from bench.tune.run import best, rejection


def best_table(records: list[TuneRecord]) -> Table:
    """The fastest configuration of each entry as a line of configs.py, with its lead over the present one."""
    table = Table(title="Fastest configuration of each entry, and its lead over the present one")
    for heading in ("table", "type", "width", "Config", "us", "present, us", "lead"):
        table.add_column(heading)
    for fastest, now in best(records):
        lead = "present one stays" if fastest is now else ratio(fastest, now)
        times = (f"{record.seconds.median * 1e6:.1f}" for record in (fastest, now) if record.seconds)
        table.add_row(fastest.kernel, fastest.dtype, str(fastest.width), fastest.call, *times, lead)
    return table


def candidates_table(records: list[TuneRecord]) -> Table:
    """Every candidate with its audit."""
    table = Table(title="Candidates, compiled and not timed")
    for heading in ("table", "type", "width", "Config", "regs", "spills", "shared", "occupancy", "audit"):
        table.add_column(heading)
    for record in records:
        audit = record.audit
        numbers = (str(audit.get(name, "")) for name in ("registers", "spills", "shared_bytes"))
        share = f"{audit['occupancy']:.0%}" if "occupancy" in audit else ""
        verdict = rejection(audit) or ("ships now" if record.lane == "present" else "would be timed")
        table.add_row(record.kernel, record.dtype, str(record.width), record.call, *numbers, share, verdict)
    return table
