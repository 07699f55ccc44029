"""Renders the audit as tables for the terminal."""

from rich.table import Table

from bench.audit.run import Record, severity
from bench.core import floors

CAPTION = "issue: TB/s that an H200's schedulers can issue (copy rate: 4.3); TFLOP/s for attention (product rate: 790)"


def audit_table(records: list[Record], rows: int) -> Table:
    """The worst `rows` records, worst first."""
    title = f"{min(rows, len(records))} of {len(records)} kernels, worst first"
    table = Table(title=title, caption=CAPTION)
    table.add_column("kernel", no_wrap=True)
    for heading in ("tile x warps", "regs", "spill", "shared", "occ.", "KiB in flight", "16 B", "instr.", "/elem."):
        table.add_column(heading, justify="right")
    for heading in ("philox/elem.", "matrix", "issue"):
        table.add_column(heading, justify="right")
    for record in sorted(records, key=severity)[:rows]:
        table.add_row(*_cells(record))
    return table


def _cells(record: Record) -> list[str]:
    config = record["config"]
    matrix = " ".join(f"{count} {kind}" for kind, count in record["matrix"].items())
    return [
        record["key"],
        " x ".join(str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "num_warps") if name in config),
        str(record["registers"]),
        _alarm(record["spills"]),
        str(record["shared_bytes"]),
        f"{record['occupancy']:.0%}",
        f"{record['kib_in_flight']:.0f}",
        f"{record['wide_share']:.0%}",
        f"{record['hot_instructions']}{' loop' if record['loops'] else ''}",
        f"{record['instructions_per_element']:.1f}",
        f"{record['philox_multiplies_per_element']:.1f}",
        matrix or "-",
        f"{record['issue_tb_per_second']:.1f} TB/s" if "issue_tb_per_second" in record else _tflops(record),
    ]


def _tflops(record: Record) -> str:
    return f"{record['issue_tflop_per_second']} TFLOP/s"


def _alarm(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "0"


def floor_table(ops: list[str]) -> Table:
    """The floors in microseconds for 2-byte elements at BERT's shapes."""
    title = "Floors in microseconds, 2-byte elements: bytes / 4.3 TB/s or operations / 790 TFLOP/s, whichever is longer"
    table = Table(title=title)
    for heading in ("op", "direction", "model"):
        table.add_column(heading)
    for heading in floors.SHAPES:
        table.add_column(heading, justify="right")
    for op in ops:
        if op == "adamw":
            for model, hidden in floors.MODELS.items():
                floor = floors.floor_microseconds(floors.adamw_bytes() * floors.parameters(hidden))
                table.add_row(op, "step, fp32", model, *[f"{floor:.0f}"] * len(floors.SHAPES))
            continue
        for direction in floors.spec(op).tensors:
            for model, hidden in floors.MODELS.items():
                cells = [_floor(op, direction, *shape, hidden) for shape in floors.SHAPES.values()]
                table.add_row(op, direction, model, *cells)
    return table


def _floor(op: str, direction: str, batch: int, seqlen: int, hidden: int) -> str:
    moved = floors.stated_bytes(op, direction, batch * seqlen, hidden, 2)
    operations = floors.stated_operations(op, direction, batch, seqlen, hidden)
    return f"{floors.floor_microseconds(moved, operations):.1f}"
