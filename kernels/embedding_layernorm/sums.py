"""Gradients of embedding tables whose rows follow from a token's place (positions) or are very few (types): column sums.

dz [T, H], seen as [outer, inner, H], is summed over its first axis, separately per type: partial sums per piece of that axis,
in float32 (float64). One finishing kernel then adds up all partial sums of the op, these and those of LayerNorm's weight and
bias, and rounds each sum once, to its parameter's dtype. The order is always the same: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..core.device_math import offsets, place_of_tile
from ..core.failures import or_plain
from ..core.launch import accumulator, accumulator_torch, cdiv, choose, launch, next_power_of_2, resident_programs
from . import plain

GROUPS = 32  # pieces for sums by type alone, so that enough programs have work
MAX_TYPES = 4  # sums per type are in registers; larger tables go through gradients.py


@triton.jit(do_not_specialize=["n_tokens", "n_outer", "n_inner", "n_a_piece", "n_types", "seqlen"])
def embedding_layernorm_bwd_sums_kernel(
    dz_ptr,
    type_ids_ptr,
    rows_ptr,
    sums_ptr,
    n_tokens,
    n_outer,
    n_inner,
    n_a_piece,
    n_types,
    seqlen,
    type_batch_stride,
    N_COLS: tl.constexpr,
    TYPES: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    n_inner_blocks = tl.cdiv(n_inner, BLOCK_M)
    piece = (block // n_inner_blocks).to(tl.int64)
    # A tile is AT_ONCE steps of the outer axis times BLOCK_M of the inner axis.
    tile = tl.arange(0, AT_ONCE * BLOCK_M)
    inner = (block % n_inner_blocks) * BLOCK_M + tile % BLOCK_M
    end = tl.minimum((piece + 1) * n_a_piece, n_outer)
    types = tl.arange(0, TYPES)[:, None, None]

    total = tl.zeros([TYPES, AT_ONCE * BLOCK_M, BLOCK_N], ACC)
    for step in range(0, n_a_piece, AT_ONCE):
        outer = piece * n_a_piece + step + tile // BLOCK_M
        tokens = outer * n_inner + inner
        mask = (outer < end) & (inner < n_inner) & (tokens < n_tokens)
        if rows_ptr is not None:
            tokens = tl.load(rows_ptr + tokens, mask, other=-1).to(tl.int64)
            mask = mask & (tokens >= 0)
        here = offsets(tokens[:, None], cols[None, :], N_COLS, 1)
        dz = tl.load(dz_ptr + here, mask[:, None] & col_mask[None, :], other=0.0).to(ACC)[None, :, :]
        if TYPES > 1:
            batch, place = tokens.to(tl.int32) // seqlen, tokens.to(tl.int32) % seqlen
            ids = tl.load(type_ids_ptr + batch.to(tl.int64) * type_batch_stride + place, mask, other=0)
            dz = tl.where(ids[None, :, None] == types, dz, 0.0)
        total += dz

    sums = tl.sum(tl.reshape(total, [TYPES, AT_ONCE, BLOCK_M, BLOCK_N]), axis=1)
    inner = ((block % n_inner_blocks) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :, None]
    rows = (piece * n_inner + inner) * n_types + types
    stored = (types < n_types) & (inner < n_inner) & col_mask[None, None, :]
    tl.store(sums_ptr + offsets(rows, cols[None, None, :], N_COLS, 1), sums, stored)


@triton.jit
def added_up(
    sums_ptr,
    first,
    n_rows,
    n_together,
    step,
    cols,
    col_mask,
    N_COLS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of n_rows rows: n_together adjacent ones from `first` on, then as many `step` rows further, and so on."""
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, n_rows, BLOCK_M):
        numbers = start + tl.arange(0, BLOCK_M)
        rows = first + numbers // n_together * step + numbers % n_together
        mask = (numbers < n_rows)[:, None] & col_mask[None, :]
        total += tl.load(sums_ptr + offsets(rows[:, None], cols[None, :], N_COLS, 1), mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_sums", "n_pieces", "n_inner", "n_types", "offset", "n_positions"])
def embedding_layernorm_bwd_finish_kernel(
    sums_ptr,
    place_sums_ptr,
    dweight_ptr,
    dbias_ptr,
    dpositions_ptr,
    dtypes_ptr,
    n_sums,
    n_pieces,
    n_inner,
    n_types,
    offset,
    n_positions,
    N_COLS: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS

    # One row of a result per program: weight and bias, then positions, then types.
    if sums_ptr is not None:
        if row < 2:
            total = added_up(sums_ptr, row, n_sums, 1, 2, cols, col_mask, N_COLS, ACC, BLOCK_M, BLOCK_N)
            if dweight_ptr is not None:
                tl.store(dweight_ptr + cols, total.to(dweight_ptr.dtype.element_ty), col_mask & (row == 0))
            if dbias_ptr is not None:
                tl.store(dbias_ptr + cols, total.to(dbias_ptr.dtype.element_ty), col_mask & (row == 1))
        row -= 2
    if dpositions_ptr is not None:
        if (row >= 0) & (row < n_positions):
            place = row - offset
            n_rows = tl.where((place >= 0) & (place < n_inner), n_pieces * n_types, 0)
            first, step = place * n_types, n_inner * n_types
            total = added_up(place_sums_ptr, first, n_rows, n_types, step, cols, col_mask, N_COLS, ACC, BLOCK_M, BLOCK_N)
            there = offsets(row, cols, N_COLS, 1)
            tl.store(dpositions_ptr + there, total.to(dpositions_ptr.dtype.element_ty), col_mask)
        row -= n_positions
    if dtypes_ptr is not None:
        if row >= 0:
            n_rows = tl.where(row < n_types, n_pieces * n_inner, 0)
            total = added_up(place_sums_ptr, row, n_rows, 1, n_types, cols, col_mask, N_COLS, ACC, BLOCK_M, BLOCK_N)
            there = offsets(row, cols, N_COLS, 1)
            tl.store(dtypes_ptr + there, total.to(dtypes_ptr.dtype.element_ty), col_mask)


@or_plain(plain.by_places)
def by_places(
    dz: Tensor,
    n_inner: int,
    type_ids: Tensor | None,
    n_types: int,
    seqlen: int,
    type_batch_stride: int,
    rows: Tensor | None = None,
) -> Tensor:
    """Partial sums [pieces, n_inner, n_types, H] over the outer axis of dz [T, H] seen as [outer, n_inner, H], in float32 or
    float64.

    T may end inside the outer axis' last step. type_ids are read if n_types > 1: per sequence of seqlen tokens, with a stride
    of type_batch_stride. `rows` (int32, any shape) lists the row of dz for each place in order; below 0 there is none.
    """
    n_tokens, n_cols = dz.shape
    n_tokens = n_tokens if rows is None else rows.numel()
    n_outer = cdiv(n_tokens, max(n_inner, 1))
    config = choose("embedding_sums_backward", dz, n_cols)
    block_n = min(config.BLOCK_N, next_power_of_2(n_cols))
    blocks = cdiv(n_inner, config.BLOCK_M) * cdiv(n_cols, block_n)
    steps = cdiv(n_outer, config.at_once)
    wanted = resident_programs(config, dz, steps * blocks)
    n_a_piece = cdiv(steps, max(1, wanted // max(blocks, 1))) * config.at_once
    n_pieces = cdiv(n_outer, max(n_a_piece, 1))
    sums = dz.new_empty((n_pieces, n_inner, n_types, n_cols), dtype=accumulator_torch(dz.dtype))
    launch(
        embedding_layernorm_bwd_sums_kernel,
        n_pieces * blocks,
        config,
        dz,
        dz_ptr=dz,
        type_ids_ptr=type_ids,
        rows_ptr=rows,
        sums_ptr=sums,
        n_tokens=n_tokens,
        n_outer=n_outer,
        n_inner=n_inner,
        n_a_piece=n_a_piece,
        n_types=n_types,
        seqlen=seqlen,
        type_batch_stride=type_batch_stride,
        N_COLS=n_cols,
        TYPES=next_power_of_2(n_types),
        ACC=accumulator(dz.dtype),
        VECTOR=16 // dz.element_size(),
        AT_ONCE=config.at_once,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=block_n,
    )
    return sums


@or_plain(plain.finish)
def finish(
    sums: Tensor | None,
    place_sums: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dpositions: Tensor | None,
    dtypes: Tensor | None,
    offset: int,
) -> None:
    """Write the gradients that are given.

    sums [n, 2, H] are partial sums for weight and bias; place_sums [pieces, inner, types, H] those for the positions from
    `offset` on and for the first types. Rows of a table that were not read become 0.
    """
    like = place_sums if sums is None else sums
    n_cols = like.shape[-1]
    n_pieces, n_inner, n_types = (0, 0, 1) if place_sums is None else place_sums.shape[:3]
    n_positions = 0 if dpositions is None else dpositions.shape[0]
    n_rows = (0 if sums is None else 2) + n_positions + (0 if dtypes is None else dtypes.shape[0])
    config = choose("embedding_finish", like, n_cols)
    block_n = min(config.BLOCK_N, next_power_of_2(n_cols))
    launch(
        embedding_layernorm_bwd_finish_kernel,
        n_rows * cdiv(n_cols, block_n),
        config,
        like,
        sums_ptr=sums,
        place_sums_ptr=place_sums,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dpositions_ptr=dpositions,
        dtypes_ptr=dtypes,
        n_sums=0 if sums is None else sums.shape[0],
        n_pieces=n_pieces,
        n_inner=n_inner,
        n_types=n_types,
        offset=offset,
        n_positions=n_positions,
        N_COLS=n_cols,
        ACC=accumulator(like.dtype),
        VECTOR=16 // like.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=block_n,
    )
