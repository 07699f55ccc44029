"""What a head reads of its encoder's output. The head passes it on as the keyword `reading`, which stock hands down."""

from dataclasses import dataclass

from torch import Tensor

from fastbert.layers.packing import Rows


@dataclass
class Reading:
    """`positions`: bool [B, S], None for the first of each row. `alone`: nothing else of the output is read.

    `rows` is where they lie among the B x S, once the encoder has counted them: the head need not count again.
    """

    positions: Tensor | None
    alone: bool
    rows: Rows | None = None
