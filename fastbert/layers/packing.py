"""Some rows of a [B, S, H] batch one behind the other, so that layers may run on them alone: its tokens, and those read."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbert import ops
from fastbert.layers.counts import Capacity


@dataclass(frozen=True)
class Rows:
    """N of the R rows of a tensor, in their order, a sequence after the other.

    index int32 [N] names the row that each of them is, inverse int32 [R] says the same from the other side (-1: none);
    both None where all rows are meant. cu_seqlens int32 [sequences + 1] and max_seqlen are attention's. inner_index and
    inner_inverse are index and inverse among the tokens that were packed with them, None where those are all rows.
    """

    index: Tensor | None
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    inner_index: Tensor | None = None
    inner_inverse: Tensor | None = None
    exact: bool = False  # each of the N is a row

    def take(self, x: Tensor) -> Tensor:
        """[R, H] -> [N, H]."""
        return x if self.index is None else ops.gather_rows(x, self.index, self.inverse)

    def put(self, rows: Tensor) -> Tensor:
        """[N, H] -> [R, H], zeros elsewhere."""
        return rows if self.index is None else ops.gather_rows(rows, self.inverse, self.index)

    def within(self, outer: "Rows") -> "Rows":
        """The same rows, counted among those of `outer`, the tokens that were packed with them."""
        if outer.index is None:
            return self
        return Rows(self.inner_index, self.inner_inverse, self.cu_seqlens, self.max_seqlen)


def side_by_side(keys: Rows, queries: Rows) -> tuple[Tensor, Tensor]:
    """cu_seqlens of both, of one length: what is read has as many sequences as the keys, or more at its end."""
    bounds, more = keys.cu_seqlens, len(queries.cu_seqlens) - len(keys.cu_seqlens)
    if more:
        bounds = torch.cat([bounds, bounds[-1:].expand(more)])  # empty ones
    return bounds, queries.cu_seqlens


@dataclass(frozen=True)
class Packing:
    """The rows of the batch that run through the layers, and those of them (None: all) that the last layer is read at."""

    tokens: Rows
    read: Rows | None


def rows_of(chosen: Tensor, longest: int, capacity: int, exact: bool = True) -> Rows:
    """Where a bool [B, S] is true, at most `longest` times in a row of the batch and `capacity` times in all.

    exact: `capacity` times to the row. Otherwise what is left of the capacity stands for no row (index -1, taken as zeros), and
    is made sequences of its own, of `longest` at most, behind the others.
    """
    counts = ops.row_counts(chosen, None)
    return pack(counts, chosen, None, chosen.shape[1], Capacity(capacity, longest, exact), None)[0]


def pack(
    counts: Tensor,
    mask: Tensor | None,
    read: Tensor | None,
    seqlen: int,
    tokens: Capacity,
    reads: Capacity | None,
    check: bool = False,
) -> tuple[Rows, Rows | None, Tensor | None]:
    """The tokens of a bool [B, S] mask (None: all positions) and the rows that are read, for which there is capacity.

    Those are where `read` is true, and without it the first of each row; none where `reads` is None. With `check` a
    bool [3]: whether `counts`, of both masks, fit the tokens' capacity and that of what is read, and no padding is read.
    """
    alone = () if reads is None else (reads.rows, reads.longest, reads.exact)
    first = reads is not None and read is None
    capacities = tokens.rows, tokens.longest, tokens.exact, first, *(alone or (0, 0, True))
    bounds, *found = ops.packed_rows(counts, mask, read, seqlen, *capacities, check)
    fits = found.pop() if check else None
    if mask is None:
        packed = Rows(None, None, bounds, tokens.longest)
    else:
        packed, found = Rows(found[0], found[1], bounds, tokens.longest, exact=tokens.exact), found[2:]
    if reads is None:
        return packed, None, fits
    bounds, index, inverse, *inner = found
    read_rows = Rows(index, inverse, bounds, reads.longest, *inner)
    return packed, replace(read_rows, exact=reads.exact), fits
