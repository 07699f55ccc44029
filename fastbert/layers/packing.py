"""Packs rows of a [B, S, H] batch into [N, H], so that layers run on those only: the real tokens, and the rows that are read.

A packing is an index and its inverse: the forward gathers by one and the backward by the other, so neither needs atomics and
no gradient is scattered. The last layer's rows are such an index into the packed tokens. Capacity that a bucket or a budget
leaves over holds zeros (the first token's embedding if ids are packed), in sequences of its own.

The index work of a forward is two kernels: `row_counts` counts what each row has, and `packed_rows` writes every index, with
each program adding up the rows before its own. The caller's counts are compared there and asserted without waiting for the
device. tests/models/test_launches_outside_layers.py pins the launches of a step outside its layers; they may only decrease.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbert import ops
from fastbert.layers.counts import Capacity


@dataclass(frozen=True)
class Rows:
    """N of the R rows of a tensor, in their order, one sequence after the other.

    index: int32 [N], the row of the tensor that each of them is (-1: none); None for all rows.
    inverse: int32 [R], the place of each row of the tensor among them (-1: none); None for all rows.
    cu_seqlens: int32 [sequences + 1], for attention.
    max_seqlen: the longest sequence, for attention.
    inner_index, inner_inverse: index and inverse relative to the tokens packed with them; None if those are all rows.
    exact: each of the N is a row of the tensor, none is spare capacity.
    """

    index: Tensor | None
    inverse: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    inner_index: Tensor | None = None
    inner_inverse: Tensor | None = None
    exact: bool = False

    def take(self, x: Tensor) -> Tensor:
        """Gather these rows: [R, H] -> [N, H]."""
        return x if self.index is None else ops.gather_rows(x, self.index, self.inverse)

    def put(self, rows: Tensor) -> Tensor:
        """Put the rows back: [N, H] -> [R, H], zeros elsewhere."""
        return rows if self.index is None else ops.gather_rows(rows, self.inverse, self.index)

    def within(self, outer: "Rows") -> "Rows":
        """The same rows, indexed relative to `outer`, the tokens that were packed with them."""
        if outer.index is None:
            return self
        return Rows(self.inner_index, self.inner_inverse, self.cu_seqlens, self.max_seqlen)


def side_by_side(keys: Rows, queries: Rows) -> tuple[Tensor, Tensor]:
    """cu_seqlens of keys and queries, of one length. The queries may have more sequences; the keys get empty ones."""
    bounds, more = keys.cu_seqlens, len(queries.cu_seqlens) - len(keys.cu_seqlens)
    if more:
        bounds = torch.cat([bounds, bounds[-1:].expand(more)])  # empty sequences
    return bounds, queries.cu_seqlens


@dataclass(frozen=True)
class Packing:
    """The packed tokens, which run through the layers, and those of them that the head reads (None: all)."""

    tokens: Rows
    read: Rows | None


def rows_of(chosen: Tensor, longest: int, capacity: int, exact: bool = True) -> Rows:
    """The positions where a bool [B, S] is true: at most `longest` per row of the batch and `capacity` in total.

    With `exact` there are exactly `capacity`. Otherwise the spare capacity stands for no row (index -1, gathered as zeros)
    and becomes separate sequences of at most `longest`, behind the others.
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
    """The packed tokens, the rows that are read, and with `check` whether the counts fit.

    Args:
        counts: the result of ops.row_counts(mask, read).
        mask: bool [B, S], true for tokens; None for all positions.
        read: bool [B, S], true for positions that are read; None for the first of each row.
        seqlen: S.
        tokens: the capacity for tokens.
        reads: the capacity for rows that are read; None if none are.
        check: also return a bool [3]: the tokens fit, the read rows fit, and no padded position is read.
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
