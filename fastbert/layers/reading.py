"""Describes what a head reads of its encoder's output. Heads pass it as the keyword `reading`, which stock passes down."""

from dataclasses import dataclass

from torch import Tensor

from fastbert.layers.packing import Rows


@dataclass
class Reading:
    """The positions that a head reads.

    positions: bool [B, S]; None for the first position of each row.
    alone: no other position of the output is read.
    rows: these positions among the B x S rows; the encoder sets it, so that the head need not count again.
    """

    positions: Tensor | None
    alone: bool
    rows: Rows | None = None
