"""The lanes of feed_forward, and what they decide: where the products' own epilogues are no slower than cuBLAS and a kernel."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench.core.comparison import ratio
from bench.core.records import OpRecord
from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import GRADIENT, PRODUCT, decided

AFTER, EPILOGUES = "fastbert, cuBLAS + kernel", "fastbert, epilogues"
PARTS = {"forward": PRODUCT, "backward": GRADIENT}


def _make(case: Case, generator: torch.Generator, device: str) -> Inputs:
    """BERT's: [rows, H] and F = 4 H."""
    rows, hidden, inner = case.batch * case.seqlen, case.hidden, 4 * case.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    leaves = {
        "x": normal(rows, hidden),
        "weight": normal(inner, hidden) / hidden**0.5,
        "bias": normal(inner),
        "output_weight": normal(hidden, inner) / inner**0.5,
    }
    return Inputs(leaves, {}, normal(rows, hidden))


def _eager(x: Tensor, weight: Tensor, bias: Tensor, output_weight: Tensor) -> Tensor:
    """As BertIntermediate and BertOutput compute it."""
    return F.linear(F.gelu(F.linear(x, weight, bias)), output_weight)


def _compiled(case: Case) -> Function:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    call = torch.compile(_eager, dynamic=False, backend=backend)
    return lambda inputs, p: call(**inputs.leaves)


def _ours(way: tuple[bool, bool] | None) -> Lane:
    """As the table says, or what is asked for."""

    def build(case: Case) -> Function:
        def call(inputs: Inputs, p: float) -> Tensor:
            with nullcontext() if way is None else decided(*way):
                return feed_forward(**inputs.leaves)

        return call

    return Lane(build)


OP = Op(
    _make,
    lambda inputs, p: reference.feed_forward(**inputs.leaves),
    {
        "eager": Lane(lambda case: lambda inputs, p: _eager(**inputs.leaves)),
        "compile": Lane(_compiled),
        "fastbert": _ours(None),
        AFTER: _ours((False, False)),
        EPILOGUES: _ours((True, True)),
    },
)


def verdicts(records: Iterable[OpRecord]) -> list[tuple[OpRecord, OpRecord, bool]]:
    """Of each size in 16 bits and each direction in which both were timed behind their checks: the lane with epilogues, the one
    without, and whether the first is no slower: its quartiles overlap with the other's, or lie below them."""
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
    """Entries of configs.FUSED for 16-bit types, by product: (H, F) and the rows from which on every size that was timed, in
    every type, is no slower."""
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
    """Each verdict, and below them the lines for configs.py."""
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
