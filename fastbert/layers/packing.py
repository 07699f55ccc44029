"""Some rows of a [B, S, H] batch one behind the other, so that layers may run on them alone: its tokens, and those read."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import ops


@dataclass(frozen=True)
class Rows:
    """N of the R rows of a tensor, in their order, a sequence after the other.

    index int32 [N] names the row that each of them is, inverse int32 [R] says the same from the other side (-1: none);
    both None where all rows are meant. cu_seqlens int32 [sequences + 1] and max_seqlen are attention's.
    """

    index: Tensor | None
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int

    def take(self, x: Tensor) -> Tensor:
        """[R, H] -> [N, H]."""
        return x if self.index is None else ops.gather_rows(x, self.index, self.inverse)

    def put(self, rows: Tensor) -> Tensor:
        """[N, H] -> [R, H], zeros elsewhere."""
        return rows if self.index is None else ops.gather_rows(rows, self.inverse, self.index)

    def within(self, outer: "Rows") -> "Rows":
        """The same rows, counted among those of `outer`, which has them all."""
        if outer.index is None:
            return self
        index, inverse = outer.inverse[self.index.long()], self.inverse[outer.index.long()]
        return Rows(index, inverse, self.cu_seqlens, self.max_seqlen)


@dataclass(frozen=True)
class Packing:
    """The rows of the batch that run through the layers, and those of them (None: all) that the last layer is read at."""

    tokens: Rows
    read: Rows | None


def every_row(batch: int, seqlen: int, device: torch.device) -> Rows:
    return Rows(None, None, torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device), seqlen)


def first_rows(batch: int, seqlen: int, device: torch.device) -> Rows:
    """The first row of each sequence. No synchronisation, as there is one for sure."""
    first = torch.zeros(batch, seqlen, dtype=torch.bool, device=device)
    first[:, 0] = True
    return rows_of(first, batch, 1)


def rows_of(chosen: Tensor, count: int, longest: int) -> Rows:
    """Where a bool [B, S] is true: `count` times, and at most `longest` times in a row of the batch."""
    flat = chosen.flatten()
    places = flat.cumsum(0) - 1
    # What is not chosen goes to a slot behind the others, which is cut off.
    slots = torch.where(flat, places, count)
    numbers = torch.arange(len(flat), device=flat.device, dtype=torch.int32)
    index = numbers.new_empty(count + 1).scatter_(0, slots, numbers)[:count]
    inverse = torch.where(flat, places, -1).to(torch.int32)
    ends = chosen.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Rows(index, inverse, F.pad(ends, (1, 0)), longest)
