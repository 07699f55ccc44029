"""Where the rows of a padded batch stand once packed: an index, its inverse and the bounds of the sequences.

For the tokens of a [B, S] batch, for the positions that are read, and for these among the tokens. With the counts [3, B] of
row_counts, a capacity of R rows of tokens and of N rows that are read:

    forward    reads 2BS bytes, writes 4 (2R + 2BS + 2N); one program per row, which adds up the counts of the rows before it

A forward's index work is two kernels, row_counts and this one, which writes every index. Capacity left over holds no row (-1),
in sequences of its own after the others. Rows that do not fit are left out, and `fits` says so: what a caller claims is
compared here and asserted without waiting for the device. Nothing is saved, and nothing has a gradient.

tests/models/test_launches_outside_layers.py counts what a step launches outside of its layers. Those numbers may only shrink.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core.checks import check_device
from .core.failures import or_plain
from .core.launch import choose, launch
from .core.op import define_op

__all__ = ["packed_rows"]

SIZES = ("n_sequences", "seqlen", "capacity", "longest", "n_bounds", "read_capacity", "read_longest", "n_read_bounds")


@triton.jit
def totals(counts_ptr, batch, n_sequences, BLOCK_N: tl.constexpr):
    """(the sum of the counts before row `batch`, the sum of all, the largest)."""
    before = tl.zeros([BLOCK_N], tl.int64)
    every = tl.zeros([BLOCK_N], tl.int64)
    most = tl.zeros([BLOCK_N], tl.int64)
    for start in range(0, n_sequences, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        count = tl.load(counts_ptr + rows, rows < n_sequences, other=0).to(tl.int64)
        before += tl.where(rows < batch, count, 0)
        every += count
        most = tl.maximum(most, count)
    return tl.sum(before, axis=0), tl.sum(every, axis=0), tl.max(most, axis=0)


@triton.jit
def fits(counts_ptr, n_sequences, capacity, longest, EXACT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the counts fit the capacity (EXACT: fill it) and none exceeds `longest`."""
    _, n_taken, most = totals(counts_ptr, 0, n_sequences, BLOCK_N)
    enough = (n_taken == capacity) if EXACT else (n_taken <= capacity)
    return enough & (most <= longest)


@triton.jit
def store_places(index_ptr, inverse_ptr, wanted, before, capacity, numbers, inside):
    """Write the index and the inverse of the wanted rows (1, else 0), from place `before` on.

    Returns the rows' places, which rows have one, and the next free place.
    """
    places = before + tl.cumsum(wanted, axis=0) - 1
    packed = (wanted != 0) & (places < capacity)
    tl.store(index_ptr + places, numbers.to(tl.int32), packed)
    tl.store(inverse_ptr + numbers, tl.where(packed, places, -1), inside)
    return places, packed, before + tl.sum(wanted, axis=0)


@triton.jit
def store_bounds(bounds_ptr, batch, before, every, capacity, longest, n_sequences, n_bounds, BLOCK_N: tl.constexpr):
    """Write where this row's sequence starts, and a share of the bounds of the sequences in the rest of the capacity."""
    tl.store(bounds_ptr + batch, tl.minimum(before, capacity))
    for start in range(batch * BLOCK_N, n_bounds - n_sequences, n_sequences * BLOCK_N):
        steps = start + tl.arange(0, BLOCK_N)
        bounds = tl.minimum(every + steps * longest, capacity)
        tl.store(bounds_ptr + n_sequences + steps, bounds, steps < n_bounds - n_sequences)


@triton.jit
def store_rest(index_ptr, batch, every, capacity, n_sequences, BLOCK_N: tl.constexpr):
    """Write -1 for a share of the rest of the capacity."""
    for start in range(every + batch * BLOCK_N, capacity, n_sequences * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        tl.store(index_ptr + places, tl.full([BLOCK_N], -1, tl.int32), places < capacity)


@triton.jit(do_not_specialize=SIZES)
def packed_rows_kernel(
    tokens_ptr,
    read_ptr,
    counts_ptr,
    cu_seqlens_ptr,
    index_ptr,
    inverse_ptr,
    read_cu_seqlens_ptr,
    read_index_ptr,
    read_inverse_ptr,
    inner_index_ptr,
    inner_inverse_ptr,
    fits_ptr,
    tokens_batch_stride,
    tokens_col_stride,
    read_batch_stride,
    read_col_stride,
    n_sequences,
    seqlen,
    capacity,
    longest,
    n_bounds,
    read_capacity,
    read_longest,
    n_read_bounds,
    EXACT: tl.constexpr,
    READ_EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0)
    row = batch.to(tl.int64)

    if fits_ptr is not None:
        if batch == 0:
            tl.store(fits_ptr, fits(counts_ptr, n_sequences, capacity, longest, EXACT, BLOCK_N))
            read_fits = fits(counts_ptr + n_sequences, n_sequences, read_capacity, read_longest, READ_EXACT, BLOCK_N)
            tl.store(fits_ptr + 1, read_fits)
            _, missing, _ = totals(counts_ptr + 2 * n_sequences, batch, n_sequences, BLOCK_N)
            tl.store(fits_ptr + 2, missing == 0)

    before, every = row * seqlen, n_sequences.to(tl.int64) * seqlen
    if tokens_ptr is not None:
        before, every, _ = totals(counts_ptr, batch, n_sequences, BLOCK_N)
        store_rest(index_ptr, batch, every, capacity, n_sequences, BLOCK_N)
    store_bounds(cu_seqlens_ptr, batch, before, every, capacity, longest, n_sequences, n_bounds, BLOCK_N)
    read_before, all_read = row, n_sequences.to(tl.int64)
    if read_ptr is not None:
        read_before, all_read, _ = totals(counts_ptr + n_sequences, batch, n_sequences, BLOCK_N)
        store_rest(read_index_ptr, batch, all_read, read_capacity, n_sequences, BLOCK_N)
    if read_index_ptr is not None:
        store_bounds(
            read_cu_seqlens_ptr, batch, read_before, all_read, read_capacity, read_longest, n_sequences, n_read_bounds, BLOCK_N
        )
    if inner_index_ptr is not None:
        store_rest(inner_index_ptr, batch, all_read, read_capacity, n_sequences, BLOCK_N)
        store_rest(inner_inverse_ptr, batch, every, capacity, n_sequences, BLOCK_N)

    for start in range(0, seqlen, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < seqlen
        numbers = row * seqlen + cols
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + row * tokens_batch_stride + cols.to(tl.int64) * tokens_col_stride, inside, other=0)
            token = (token != 0).to(tl.int32)
            places, packed, before = store_places(index_ptr, inverse_ptr, token, before, capacity, numbers, inside)
        if read_index_ptr is not None:
            read = (cols == 0).to(tl.int32)
            if read_ptr is not None:
                read = tl.load(read_ptr + row * read_batch_stride + cols.to(tl.int64) * read_col_stride, inside, other=0)
                read = (read != 0).to(tl.int32)
            read_places, taken, read_before = store_places(
                read_index_ptr, read_inverse_ptr, read, read_before, read_capacity, numbers, inside
            )
            if inner_index_ptr is not None:
                tl.store(inner_index_ptr + read_places, tl.where(packed, places, -1), taken)
                tl.store(inner_inverse_ptr + places, tl.where(taken, read_places, -1), packed)


class Inputs(NamedTuple):
    counts: Tensor
    tokens: Tensor | None
    read: Tensor | None
    seqlen: int
    capacity: int
    longest: int
    exact: bool
    first: bool
    read_capacity: int
    read_longest: int
    read_exact: bool
    check: bool

    @property
    def reads(self) -> bool:
        return self.first or self.read is not None


def _plain(inputs: Inputs) -> list[Tensor]:
    return reference.packed_rows(*inputs)


@or_plain(_plain)
def _launch(inputs: Inputs) -> list[Tensor]:
    counts, tokens, read = inputs.counts, inputs.tokens, inputs.read
    results = _allocate(inputs)
    placed = _NOWHERE | dict(zip(_pointers(tokens is not None, inputs.reads, inputs.check), results, strict=True))
    read_bounds = placed["read_cu_seqlens_ptr"]
    n_sequences = counts.shape[1]
    config = choose("packed_rows", counts, inputs.seqlen)
    launch(
        packed_rows_kernel,
        n_sequences,
        config,
        counts,
        tokens_ptr=tokens,
        read_ptr=read,
        counts_ptr=counts,
        **placed,
        tokens_batch_stride=0 if tokens is None else tokens.stride(0),
        tokens_col_stride=0 if tokens is None else tokens.stride(1),
        read_batch_stride=0 if read is None else read.stride(0),
        read_col_stride=0 if read is None else read.stride(1),
        n_sequences=n_sequences,
        seqlen=inputs.seqlen,
        capacity=inputs.capacity,
        longest=inputs.longest,
        n_bounds=results[0].shape[0],
        read_capacity=inputs.read_capacity,
        read_longest=inputs.read_longest,
        n_read_bounds=0 if read_bounds is None else read_bounds.shape[0],
        EXACT=inputs.exact,
        READ_EXACT=inputs.read_exact,
        BLOCK_N=config.BLOCK_N,
    )
    return results


@cache
def _pointers(tokens: bool, read: bool, check: bool) -> list[str]:
    """The kernel's names of the outputs, in order, without those that are not asked for."""
    names = ["cu_seqlens_ptr"]
    if tokens:
        names += ["index_ptr", "inverse_ptr"]
    if read:
        names += ["read_cu_seqlens_ptr", "read_index_ptr", "read_inverse_ptr"]
    if tokens and read:
        names += ["inner_index_ptr", "inner_inverse_ptr"]
    return [*names, "fits_ptr"] if check else names


_NOWHERE = dict.fromkeys(_pointers(True, True, True))


def _allocate(inputs: Inputs) -> list[Tensor]:
    counts, tokens, seqlen = inputs.counts, inputs.tokens, inputs.seqlen
    capacity, read_capacity = inputs.capacity, inputs.read_capacity
    n_sequences = counts.shape[1]
    rest = 0 if inputs.exact else -(-capacity // max(inputs.longest, 1))
    results = [counts.new_empty(n_sequences + 1 + rest)]
    if tokens is not None:
        results += [counts.new_empty(capacity), counts.new_empty(n_sequences * seqlen)]
    if inputs.reads:
        # At least as many sequences as the tokens have: attention takes equal numbers.
        rest = rest if inputs.read_exact else max(rest, -(-read_capacity // max(inputs.read_longest, 1)))
        sizes = n_sequences + 1 + rest, read_capacity, n_sequences * seqlen
        results += [counts.new_empty(size) for size in sizes]
        if tokens is not None:
            results += [counts.new_empty(read_capacity), counts.new_empty(capacity)]
    if inputs.check:
        results.append(counts.new_empty(3, dtype=torch.bool))
    return results


_call = define_op("packed_rows", (_launch, _allocate))


def packed_rows(
    counts: Tensor,
    tokens: Tensor | None,
    read: Tensor | None,
    seqlen: int,
    capacity: int,
    longest: int,
    exact: bool = True,
    first: bool = False,
    read_capacity: int = 0,
    read_longest: int = 0,
    read_exact: bool = True,
    check: bool = False,
) -> list[Tensor]:
    """The rows of a [B, S] batch to pack, the rows that are read, and the latter among the packed rows.

    Args:
        counts: int32 [3, B], row_counts(tokens, read). With `check`, the count of a mask that exists but is None here must
            still be in it.
        tokens: bool [B, S], any strides: which positions to pack; None: all.
        read: bool [B, S], any strides: which positions are read; None: nothing, or with `first` the first position of each row.
        seqlen: S.
        capacity, longest: the number of rows to pack into, and the largest number in a row of the batch (B S and S without
            `tokens`).
        exact: the tokens fill `capacity`; otherwise they may be fewer, and the rest is sequences of `longest` without rows.
        read_capacity, read_longest, read_exact: the same for the rows that are read; B, 1 and True with `first`.
        check: whether to compare with `counts`.

    Returns:
        cu_seqlens int32 [sequences + 1]; with `tokens`, index [capacity], the row of the batch at each place (-1: none), and
        inverse [B S], the place of each row of the batch (-1: none). Then, if anything is read, the same three for what is
        read, and with `tokens` the index and the inverse of that among the tokens. With `check`, fits bool [3]: whether
        `capacity` and `longest` hold, the same for what is read, and whether every position that is read is a token.

    Raises:
        ValueError: counts or masks of another dtype or shape, or on another device.
    """
    if counts.dtype != torch.int32 or counts.dim() != 2 or counts.shape[0] != 3:
        raise ValueError(f"counts: expected int32 [3, B], got {counts.dtype} {tuple(counts.shape)}")
    for name, mask in (("tokens", tokens), ("read", read)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (counts.shape[1], seqlen)):
            expected = (counts.shape[1], seqlen)
            raise ValueError(f"{name}: expected bool {expected}, got {mask.dtype} {tuple(mask.shape)}")
        check_device(name, mask, counts)
    capacities = capacity, longest, exact, first, read_capacity, read_longest, read_exact
    return _call(Inputs(counts.contiguous(), tokens, read, seqlen, *capacities, check))
