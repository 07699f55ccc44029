"""Gradients of embedding tables from those of the rows that were read from them: sums over tokens, without atomics.

Two ways from dz [T, H] to a table. Both add in float32, in an order that only the ids decide, and round once:

    runs   ids in any order (words): tokens are sorted by id, so those of one row of the table are a run. A run is cut
           into pieces at multiples of PIECE places; a piece within a run's ends there writes the row, pieces of a run
           that crosses such a place leave partial sums, which a second kernel adds up. A [CLS] of ten thousand tokens
           is then as parallel as any others.
    sums   tokens whose id follows from their place (positions), or is one of very few (types): dz, seen as
           [outer, inner, H], is summed over its first axis, apart for each type. Partial sums a piece of that axis,
           added up afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .device_math import block_rows, columns, offsets
from .failures import or_plain
from .launch import accumulator, accumulator_torch, choose, launch, resident_programs

PIECE = 32  # places of the sorted order that one sum is over at most
JOINED = 16  # partial sums of a run that are read at once
GROUPS = 32  # sums that types alone are split into, so that enough programs have work
MOST_TYPES = 4  # sums are kept apart in registers; a table with more rows goes the other way


@triton.jit(do_not_specialize=["n_places", "n_table_rows", "skip"])
def embedding_layernorm_bwd_runs_kernel(
    dz_ptr,
    ids_ptr,
    order_ptr,
    dtable_ptr,
    partials_ptr,
    n_places,
    n_table_rows,
    skip,
    N_COLS: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_col_blocks: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    places = block_rows(program // n_col_blocks, BLOCK_M)
    cols = (program % n_col_blocks) * BLOCK_N + columns(BLOCK_N, VECTOR)
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
    # Of each PIECE places two partial sums at most: of a run that comes from before (0), of one that starts here (1).
    slots = places // PIECE * 2 + tl.where(went_on, 0, 1)
    parts = (goes_on | went_on)[:, None] & col_mask[None, :]
    tl.store(partials_ptr + offsets(slots[:, None], cols[None, :], N_COLS, 1), total, parts)


@triton.jit(do_not_specialize=["n_pieces", "n_table_rows", "skip"])
def embedding_layernorm_bwd_joins_kernel(
    ids_ptr,
    partials_ptr,
    dtable_ptr,
    n_pieces,
    n_table_rows,
    skip,
    N_COLS: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_col_blocks: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    piece = (program // n_col_blocks).to(tl.int64)
    cols = (program % n_col_blocks) * BLOCK_N + columns(BLOCK_N, VECTOR)
    col_mask = cols < N_COLS

    # The run at the end of this piece, if it starts in it and goes on: there is a place behind it, see the launcher.
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


@triton.jit(do_not_specialize=["n_tokens", "n_outer", "n_inner", "n_a_piece", "n_types"])
def embedding_layernorm_bwd_sums_kernel(
    dz_ptr,
    type_ids_ptr,
    sums_ptr,
    n_tokens,
    n_outer,
    n_inner,
    n_a_piece,
    n_types,
    N_COLS: tl.constexpr,
    TYPES: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_col_blocks: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    cols = (program % n_col_blocks) * BLOCK_N + columns(BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    block = program // n_col_blocks
    n_inner_blocks = tl.cdiv(n_inner, BLOCK_M)
    piece = (block // n_inner_blocks).to(tl.int64)
    # A tile is AT_ONCE steps of the outer axis times BLOCK_M of the inner.
    tile = tl.arange(0, AT_ONCE * BLOCK_M)
    inner = (block % n_inner_blocks) * BLOCK_M + tile % BLOCK_M
    end = tl.minimum((piece + 1) * n_a_piece, n_outer)
    types = tl.arange(0, TYPES)[:, None, None]

    total = tl.zeros([TYPES, AT_ONCE * BLOCK_M, BLOCK_N], ACC)
    for step in range(0, n_a_piece, AT_ONCE):
        outer = piece * n_a_piece + step + tile // BLOCK_M
        tokens = outer * n_inner + inner
        mask = (outer < end) & (inner < n_inner) & (tokens < n_tokens)
        here = offsets(tokens[:, None], cols[None, :], N_COLS, 1)
        dz = tl.load(dz_ptr + here, mask[:, None] & col_mask[None, :], other=0.0).to(ACC)[None, :, :]
        if TYPES > 1:
            ids = tl.load(type_ids_ptr + tokens, mask, other=0)
            dz = tl.where(ids[None, :, None] == types, dz, 0.0)
        total += dz

    sums = tl.sum(tl.reshape(total, [TYPES, AT_ONCE, BLOCK_M, BLOCK_N]), axis=1)
    inner = ((block % n_inner_blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]
    rows = (piece * n_inner + inner) * n_types + types
    stored = (types < n_types) & (inner < n_inner) & col_mask[None, None, :]
    tl.store(sums_ptr + offsets(rows, cols[None, None, :], N_COLS, 1), sums, stored)


@or_plain(plain.by_runs)
def by_runs(dz: Tensor, ids: Tensor, n_table_rows: int, skip: int | None, dtype: torch.dtype) -> Tensor:
    """The gradient [n_table_rows, H] of a table from dz [T, H] and the rows of it that were read, ids [T].

    Row `skip` stays 0, as do those that nobody read.
    """
    n_places, n_cols = dz.shape
    dtable = torch.zeros((n_table_rows, n_cols), dtype=dtype, device=dz.device)
    sorted_ids, order = ids.to(torch.int32).sort(stable=True)
    config = choose("embedding_runs", dz, n_cols)
    n_pieces = triton.cdiv(n_places, PIECE)
    partials = torch.empty((2 * n_pieces, n_cols), dtype=accumulator_torch(dz.dtype), device=dz.device)
    block_n = min(config.BLOCK_N, triton.next_power_of_2(n_cols))
    col_blocks = triton.cdiv(n_cols, block_n)
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
        triton.cdiv(n_places, config.BLOCK_M) * col_blocks,
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


@or_plain(plain.by_places)
def by_places(dz: Tensor, n_inner: int, type_ids: Tensor | None, n_types: int) -> Tensor:
    """Sums [n_inner, n_types, H], in float32 or float64, of dz [T, H] seen as [outer, n_inner, H] over its outer axis.

    T may end within the outer axis' last step. type_ids [T] are read if n_types > 1.
    """
    n_tokens, n_cols = dz.shape
    n_outer = triton.cdiv(n_tokens, max(n_inner, 1))
    config = choose("embedding_sums_backward", dz, n_cols)
    block_n = min(config.BLOCK_N, triton.next_power_of_2(n_cols))
    blocks = triton.cdiv(n_inner, config.BLOCK_M) * triton.cdiv(n_cols, block_n)
    steps = triton.cdiv(n_outer, config.at_once)
    wanted = resident_programs(config, dz, steps * blocks)
    n_a_piece = triton.cdiv(steps, max(1, wanted // max(blocks, 1))) * config.at_once
    n_pieces = triton.cdiv(n_outer, max(n_a_piece, 1))
    sums = torch.empty((n_pieces, n_inner, n_types, n_cols), dtype=accumulator_torch(dz.dtype), device=dz.device)
    launch(
        embedding_layernorm_bwd_sums_kernel,
        n_pieces * blocks,
        config,
        dz,
        dz_ptr=dz,
        type_ids_ptr=type_ids,
        sums_ptr=sums,
        n_tokens=n_tokens,
        n_outer=n_outer,
        n_inner=n_inner,
        n_a_piece=n_a_piece,
        n_types=n_types,
        N_COLS=n_cols,
        TYPES=triton.next_power_of_2(n_types),
        ACC=accumulator(dz.dtype),
        VECTOR=16 // dz.element_size(),
        AT_ONCE=config.at_once,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=block_n,
    )
    return sums.sum(0)
