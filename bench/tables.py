"""The audit as tables in the terminal."""

from rich.table import Table

from bench import floors
from bench.audit import Record, severity


def audit_table(records: list[Record], rows: int) -> Table:
    """The worst `rows` records first."""
    title = f"{min(rows, len(records))} of {len(records)} kernels, worst first"
    table = Table(title=title, caption="issue TB/s: what an H200's schedulers could keep up with; it copies 4.3")
    table.add_column("kernel", no_wrap=True)
    for heading in ("rows x warps", "regs", "spill", "shared", "occ.", "KiB in flight", "16 B", "instr.", "/elem."):
        table.add_column(heading, justify="right")
    for heading in ("philox/elem.", "matrix", "issue TB/s"):
        table.add_column(heading, justify="right")
    for record in sorted(records, key=severity)[:rows]:
        table.add_row(*_cells(record))
    return table


def _cells(record: Record) -> list[str]:
    config = record["config"]
    matrix = " ".join(f"{count} {kind}" for kind, count in record["matrix"].items())
    return [
        record["key"],
        f"{config['BLOCK_M']} x {config['num_warps']}",
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
        f"{record['issue_tb_per_second']:.1f}",
    ]


def _alarm(count: int) -> str:
    return f"[bold red]{count}[/]" if count else "0"


def floor_table(ops: list[str]) -> Table:
    """The floors in microseconds for 2-byte elements at BERT's shapes."""
    table = Table(title="Floors in microseconds: stated bytes / 4.3 TB/s, 2-byte elements (4-byte ones take twice)")
    for heading in ("op", "direction", "model"):
        table.add_column(heading)
    for heading in floors.TOKENS:
        table.add_column(f"{heading} tokens", justify="right")
    for op in ops:
        for direction in floors.TENSORS[op]:
            for model, hidden in floors.MODELS.items():
                moved = [floors.stated_bytes(op, direction, tokens, hidden, 2) for tokens in floors.TOKENS.values()]
                table.add_row(op, direction, model, *(f"{floors.floor_microseconds(m):.1f}" for m in moved))
    return table
