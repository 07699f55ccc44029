"""Gradients of embedding tables from dz [T, H], the gradients of the rows that were read: sums over sorted tokens.

Tokens are ordered by id, so the tokens of one table row form a run. A run is cut into pieces at multiples of PIECE places. A
piece that is a whole run writes the table row; pieces of a run that crosses such a place write partial sums, which a second
kernel adds up. A word that half of the batch consists of is then as parallel as any other. Sums are in float32 (float64), in an
order that depends only on the ids, and are rounded once: no atomics, the same bits every time.

Up to MAX_RANKED ids are ranked rather than sorted: T^2 comparisons in one kernel cost less than a sort's launches. Positions
that are counted, and types that are few, need no order: sums.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.device_math import block_rows, offsets, place_of_tile
from ..core.failures import or_plain
from ..core.launch import accumulator, accumulator_torch, cdiv, choose, launch, next_power_of_2
from . import plain

PIECE = 32  # at most so many places of the sorted order per sum
JOINED = 16  # partial sums of a run that are read at once
PLACE_BITS = tl.constexpr(14)
MAX_RANKED = 1 << PLACE_BITS.value  # up to so many ids one kernel takes less time than the dozen launches of a sort
NO_ID = tl.constexpr(2**17 - 1)  # larger than any id that fits an int32 together with its place
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["n_places", "n_table_rows", "skip"])
def embedding_layernorm_bwd_runs_kernel(
    dz_ptr, ids_ptr, order_ptr, dtable_ptr, partials_ptr, n_places, n_table_rows, skip,
    N_COLS: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, PIECE: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    places = block_rows(block, BLOCK_M)
    col_mask = cols < N_COLS

    # A place is idle unless a piece starts there.
    here = places < n_places
    ids = tl.load(ids_ptr + places, here, other=-1)
    before = tl.load(ids_ptr + places - 1, here & (places > 0), other=-1)
    wanted = (ids >= 0) & (ids < n_table_rows) & (ids != skip)
    wanted = wanted & ((places % PIECE == 0) | (ids != before))
    end = tl.minimum((places // PIECE + 1) * PIECE, n_places)
    following = places[:, None] + tl.arange(0, PIECE)[None, :]
    same = tl.load(ids_ptr + following, wanted[:, None] & (following < end[:, None]), other=-1) == ids[:, None]
    length = tl.where(wanted, tl.sum(same.to(tl.int32), axis=1), 0)

    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, tl.max(length, axis=0), AT_ONCE):
        steps = start + tl.arange(0, AT_ONCE)[None, :]
        taken = steps < length[:, None]
        tokens = tl.load(order_ptr + places[:, None] + steps, taken, other=0)
        here_dz = offsets(tokens[:, :, None], cols[None, None, :], N_COLS, 1)
        dz = tl.load(dz_ptr + here_dz, taken[:, :, None] & col_mask[None, None, :], other=0.0).to(ACC)
        total += tl.sum(dz, axis=1)

    after = places + length
    goes_on = wanted & (tl.load(ids_ptr + after, wanted & (after < n_places), other=-1) == ids)
    went_on = wanted & (before == ids)
    whole = wanted & ((goes_on | went_on) == 0)
    table_offsets = offsets(ids[:, None], cols[None, :], N_COLS, 1)
    tl.store(dtable_ptr + table_offsets, total.to(dtable_ptr.dtype.element_ty), whole[:, None] & col_mask[None, :])
    # PIECE places have at most two partial sums: of a run that began before them (0), and of one that starts in them (1).
    slots = places // PIECE * 2 + tl.where(went_on, 0, 1)
    parts = (goes_on | went_on)[:, None] & col_mask[None, :]
    tl.store(partials_ptr + offsets(slots[:, None], cols[None, :], N_COLS, 1), total, parts)


@triton.jit(do_not_specialize=["n_pieces", "n_table_rows", "skip"])
def embedding_layernorm_bwd_joins_kernel(
    ids_ptr, partials_ptr, dtable_ptr, n_pieces, n_table_rows, skip,
    N_COLS: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    piece, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    piece = piece.to(tl.int64)
    col_mask = cols < N_COLS

    # The run at the end of this piece, if it starts in the piece and continues. Another piece follows: see the launcher's grid.
    end = (piece + 1) * PIECE
    id_ = tl.load(ids_ptr + end - 1)
    before = tl.load(ids_ptr + piece * PIECE - 1, piece > 0, other=-1)
    more = (tl.load(ids_ptr + end) == id_) & (before != id_) & (id_ >= 0) & (id_ < n_table_rows) & (id_ != skip)
    if more:
        total = tl.load(partials_ptr + offsets(piece * 2 + 1, cols, N_COLS, 1), col_mask, other=0.0)
        first = piece + 1
        while more:
            pieces = first + tl.arange(0, BLOCK_M)
            same = tl.load(ids_ptr + pieces * PIECE, pieces < n_pieces, other=-1) == id_
            slots = offsets(pieces[:, None] * 2, cols[None, :], N_COLS, 1)
            total += tl.sum(tl.load(partials_ptr + slots, same[:, None] & col_mask[None, :], other=0.0), axis=0)
            first += BLOCK_M
            more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_M
        tl.store(dtable_ptr + offsets(id_, cols, N_COLS, 1), total.to(dtable_ptr.dtype.element_ty), col_mask)


@triton.jit
def _keys(ids, places):
    """An id and its place as one number, never negative. Numbers that are no ids come last."""
    return (tl.where((ids >= 0) & (ids < NO_ID), ids, NO_ID) << PLACE_BITS) | places


@triton.jit(do_not_specialize=["n_places"])
def embedding_layernorm_bwd_order_kernel(
    ids_ptr,
    sorted_ptr,
    order_ptr,
    n_places,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = places < n_places
    ids = tl.load(ids_ptr + places, here, other=0).to(tl.int32)

    # An id's rank: how many ids are smaller, plus how many equal ones stand before it, counted by the signs of differences.
    keys = _keys(ids, places)
    first = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
    for start in range(0, n_places, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        other_ids = tl.load(ids_ptr + others, others < n_places, other=0).to(tl.int32)
        other_keys = tl.where(others < n_places, _keys(other_ids, others), LARGEST)
        first += (other_keys[None, :] - keys[:, None]).to(tl.uint32, bitcast=True) >> 31
    rank = tl.sum(first, axis=1).to(tl.int64)

    tl.store(sorted_ptr + rank, ids, here)
    tl.store(order_ptr + rank, places, here)


def in_order(ids: Tensor, n_table_rows: int) -> tuple[Tensor, Tensor]:
    """ids [T], below n_table_rows, in ascending order, int32, and their places in `ids`; equal ids keep their order."""
    if ids.numel() > MAX_RANKED or n_table_rows > NO_ID.value:
        return ids.to(torch.int32).sort(stable=True)  # which suffices for rows of a table
    return _ranked(ids.contiguous())


@or_plain(plain.in_order)
def _ranked(ids: Tensor) -> tuple[Tensor, Tensor]:
    """in_order by T^2 comparisons, which up to MAX_RANKED ids take less time than a sort's launches."""
    sorted_ids = ids.new_empty(ids.shape, dtype=torch.int32)
    order = torch.empty_like(sorted_ids)
    config = choose("embedding_order", order, ids.shape[0])
    launch(
        embedding_layernorm_bwd_order_kernel,
        cdiv(ids.shape[0], config.BLOCK_M),
        config,
        ids,
        ids_ptr=ids,
        sorted_ptr=sorted_ids,
        order_ptr=order,
        n_places=ids.shape[0],
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return sorted_ids, order


@or_plain(plain.by_runs)
def by_runs(dz: Tensor, ids: Tensor, n_table_rows: int, skip: int | None, dtype: torch.dtype) -> Tensor:
    """The gradient [n_table_rows, H] of a table from dz [T, H] and the rows that were read, ids [T].

    Row `skip` and rows that were not read are 0.
    """
    n_places, n_cols = dz.shape
    dtable = dz.new_zeros((n_table_rows, n_cols), dtype=dtype)
    sorted_ids, order = in_order(ids, n_table_rows)
    config = choose("embedding_runs", dz, n_cols)
    n_pieces = cdiv(n_places, PIECE)
    partials = dz.new_empty((2 * n_pieces, n_cols), dtype=accumulator_torch(dz.dtype))
    block_n = min(config.BLOCK_N, next_power_of_2(n_cols))
    col_blocks = cdiv(n_cols, block_n)
    shared = {
        "n_table_rows": n_table_rows,
        "skip": -1 if skip is None else skip,
        "N_COLS": n_cols,
        "ACC": accumulator(dz.dtype),
        "PIECE": PIECE,
        "BLOCK_N": block_n,
    }
    launch(
        embedding_layernorm_bwd_runs_kernel,
        cdiv(n_places, config.BLOCK_M) * col_blocks,
        config,
        dz,
        dz_ptr=dz,
        ids_ptr=sorted_ids,
        order_ptr=order,
        dtable_ptr=dtable,
        partials_ptr=partials,
        n_places=n_places,
        VECTOR=16 // dz.element_size(),
        AT_ONCE=config.at_once,
        BLOCK_M=config.BLOCK_M,
        **shared,
    )
    launch(
        embedding_layernorm_bwd_joins_kernel,
        max(n_pieces - 1, 0) * col_blocks,
        config,
        dz,
        ids_ptr=sorted_ids,
        partials_ptr=partials,
        dtable_ptr=dtable,
        n_pieces=n_pieces,
        VECTOR=16 // dtable.element_size(),
        BLOCK_M=JOINED,
        **shared,
    )
    return dtable
