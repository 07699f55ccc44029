"""Some rows of a [B, S, H] batch one behind the other, so that layers may run on them alone: its tokens, and those read."""

from dataclasses import dataclass, replace

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
        return replace(self, index=_at(outer.inverse, self.index), inverse=_at(self.inverse, outer.index))


def _at(numbers: Tensor, index: Tensor) -> Tensor:
    """numbers[index], -1 where the index is -1."""
    return torch.where(index >= 0, numbers[index.clamp(min=0).long()], -1)


def side_by_side(keys: Rows, queries: Rows) -> tuple[Tensor, Tensor]:
    """cu_seqlens of both, of one length: where one has more sequences at its end, the other has empty ones."""
    more = len(keys.cu_seqlens) - len(queries.cu_seqlens)
    longer = [rows.cu_seqlens for rows in (keys, queries)]
    if more:
        shorter = longer[more > 0]
        longer[more > 0] = torch.cat([shorter, shorter[-1:].expand(abs(more))])
    return longer[0], longer[1]


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
    return rows_of(first, 1, batch)


def rows_of(chosen: Tensor, longest: int, room: int, exact: bool = True) -> Rows:
    """Where a bool [B, S] is true, at most `longest` times in a row of the batch and `room` times in all.

    exact: `room` times to the row. Otherwise what is left of the room stands for no row (index -1, taken as zeros), and
    is made sequences of its own, of `longest` at most, behind the others.
    """
    flat = chosen.flatten()
    places = flat.cumsum(0) - 1
    # What is not chosen goes to a slot behind the others, which is cut off; so does what the room is too small for.
    slots = torch.where(flat, places, room).clamp(max=room)
    numbers = torch.arange(len(flat), device=flat.device, dtype=torch.int32)
    index = numbers.new_full((room + 1,), -1).scatter_(0, slots, numbers)[:room]
    inverse = torch.where(flat & (places < room), places, -1).to(torch.int32)
    cu_seqlens = F.pad(chosen.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    if not exact:
        steps = torch.arange(1, -(-room // max(longest, 1)) + 1, device=flat.device, dtype=torch.int32)
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1] + steps * longest]).clamp(max=room)
    return Rows(index, inverse, cu_seqlens, longest)
