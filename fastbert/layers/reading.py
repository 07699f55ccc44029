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

    @property
    def hides_padding(self) -> bool:
        """Whether no padded position of the output is read, so that the encoder may pack."""
        return self.alone


@dataclass(kw_only=True)
class PooledReading(Reading):
    """What a pooling reads: rows of the output that need not be unpacked, of which the encoder leaves the packed form here.

    If not `alone`, all tokens are read, and `positions` (None: none) must be tokens. The encoder then returns an output
    without values, of the shape, dtype and device that stock's would have.

    per_row: how many of `positions` each row has, if that is known.
    hidden: [N, H], set by an encoder that packs: the rows that are read if `alone`, else all tokens.
    tokens: the places of these rows, set with them.
    padded: why the encoder did not pack, set by an encoder that does not.
    """

    per_row: int | None = None
    hidden: Tensor | None = None
    tokens: Rows | None = None
    padded: str | None = None

    @property
    def hides_padding(self) -> bool:
        return True
