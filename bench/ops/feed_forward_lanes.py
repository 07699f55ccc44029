"""Lanes of feed_forward. They decide where products with epilogues are no slower than cuBLAS followed by a kernel."""

from collections.abc import Iterable

from rich.table import Table
from torch import Tensor

from bench.core.comparison import ratio
from bench.core.records import OpRecord
from bench.ops.grid import Inputs, Lane
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import GRADIENT, PRODUCT, decided

AFTER, EPILOGUES = "fastbert, cuBLAS + kernel", "fastbert, epilogues"
PARTS = {"forward": PRODUCT, "backward": GRADIENT}


def _deciding(way: tuple[bool, bool]) -> Lane:
    """A lane with the given epilogues, regardless of the table."""

    def call(inputs: Inputs, p: float) -> Tensor:
        with decided(*way):
            return feed_forward(**inputs.leaves)

    return Lane(lambda case: call)


WAYS = {AFTER: _deciding((False, False)), EPILOGUES: _deciding((True, True))}


def verdicts(records: Iterable[OpRecord]) -> list[tuple[OpRecord, OpRecord, bool]]:
    """For each size in 16 bits and each direction in which both were timed: the lane with epilogues, the lane without, and
    whether the first is no slower, which means that its quartiles overlap the other's or lie below them."""
    timed: dict[tuple, dict[str, OpRecord]] = {}
    for record in records:
        if record.op == "feed_forward" and record.seconds and record.direction in PARTS and record.dtype != "fp32":
            timed.setdefault(record.case, {})[record.lane] = record
    found = []
    for lanes in timed.values():
        if AFTER in lanes and EPILOGUES in lanes:
            ours, other = lanes[EPILOGUES], lanes[AFTER]
            found.append((ours, other, ours.seconds.low <= other.seconds.high))
    return found


def earned(records: Iterable[OpRecord]) -> dict[str, dict[tuple[int, int], int]]:
    """Entries of configs.FUSED for 16-bit types, by product: (H, F), and the number of rows from which every timed size is
    no slower in every type."""
    rows: dict[tuple[str, int], dict[int, bool]] = {}
    for ours, _, no_slower in verdicts(records):
        sizes = rows.setdefault((PARTS[ours.direction], ours.hidden), {})
        sizes[ours.batch * ours.seqlen] = sizes.get(ours.batch * ours.seqlen, True) and no_slower
    found: dict[str, dict[tuple[int, int], int]] = {PRODUCT: {}, GRADIENT: {}}
    for (part, hidden), sizes in rows.items():
        slower = max((n for n, no_slower in sizes.items() if not no_slower), default=0)
        if least := [n for n in sizes if n > slower]:
            found[part][hidden, 4 * hidden] = min(least)
    return found


def earned_table(records: Iterable[OpRecord], architecture: str) -> Table:
    """A table of all verdicts, with the lines for configs.py below."""
    records = list(records)
    lines = [f'FUSED["{part}"]["{architecture}"] = {{2: {shapes}}}' for part, shapes in earned(records).items() if shapes]
    caption = "\n".join(lines) or "No entry is earned: configs.FUSED stays as it is."
    table = Table(title="The feed-forward's products with epilogues against cuBLAS and a kernel", caption=caption)
    for heading in ("direction", "type", "H", "rows", "epilogues, us", "cuBLAS + kernel, us", "epilogues"):
        table.add_column(heading)
    for ours, other, _ in verdicts(records):
        size = ours.direction, ours.dtype, str(ours.hidden), str(ours.batch * ours.seqlen)
        times = (f"{record.seconds.median * 1e6:.1f}" for record in (ours, other) if record.seconds)
        table.add_row(*size, *times, ratio(ours, other))
    return table
