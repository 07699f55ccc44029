"""The two kernels of embedding_layernorm that pass over tokens: gather and sum three rows, LayerNorm, dropout."""

import triton
import triton.language as tl

from ..core.device_math import (
    beside_chunks,
    block_rows,
    columns,
    columns_of_chunks,
    dropout,
    keep_mask,
    layernorm,
    layernorm_backward,
    offsets,
    tile_offsets,
)
from ..core.layernorm_rows import load_statistics, load_upstream, store_statistics, store_sums

SIZES = ("seqlen", "offset", "n_words", "n_positions", "n_types", "n_rows", "n_programs")  # not specialised


@triton.jit
def named_rows(ids_ptr, places, mask, n_table_rows):
    """int64 table rows for the ids at these places, -1 where masked. An id outside of the table fails an assertion."""
    ids = tl.load(ids_ptr + places, mask, other=0).to(tl.int64)
    inside = (ids >= 0) & (ids < n_table_rows)
    tl.device_assert(inside, "index out of range", mask)
    return tl.where(inside & mask, ids, -1)


@triton.jit
def summed_rows(
    tables, ids, strides, sizes, tokens, token_mask, cols, col_mask,
    CHUNKS: tl.constexpr, N_COLS: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z of tokens [BLOCK_M] in a tile of chunks: (word + type) + position, rounded after each addition as in eager.

    tables, ids: of words, positions and types. strides: row and column stride of the table of words, then the sequence strides
    of position and type ids. sizes: tokens per sequence, the first token's position, the tables' numbers of rows.
    """
    words_ptr, positions_ptr, types_ptr = tables
    ids_ptr, position_ids_ptr, type_ids_ptr = ids
    seqlen, offset, n_words, n_positions, n_types = sizes
    # A token's number fits 32 bits (its offset may not), and 32-bit division takes a fifth of the instructions.
    batch, place = tokens.to(tl.int32) // seqlen, tokens.to(tl.int32) % seqlen
    word_rows, type_rows, position_rows = tokens, tl.zeros_like(tokens), (offset + place).to(tl.int64)
    if ids_ptr is not None:
        word_rows = named_rows(ids_ptr, tokens, token_mask, n_words)
    if type_ids_ptr is not None:
        type_rows = named_rows(type_ids_ptr, batch * strides[3] + place, token_mask, n_types)
    if position_ids_ptr is not None:
        places = batch * strides[2] + place
        position_rows = named_rows(position_ids_ptr, places, token_mask, n_positions)
    word_rows, type_rows = beside_chunks(word_rows, CHUNKS), beside_chunks(type_rows, CHUNKS)
    position_rows = beside_chunks(position_rows, CHUNKS)
    mask = beside_chunks(token_mask, CHUNKS) & col_mask
    word_offsets = offsets(word_rows, cols, strides[0], strides[1])
    word = tl.load(words_ptr + word_offsets, mask & (word_rows >= 0), other=0.0).to(ACC)
    type_offsets = offsets(type_rows, cols, N_COLS, 1)
    type_ = tl.load(types_ptr + type_offsets, mask & (type_rows >= 0), other=0.0).to(ACC)
    position_offsets = offsets(position_rows, cols, N_COLS, 1)
    position = tl.load(positions_ptr + position_offsets, mask & (position_rows >= 0), other=0.0).to(ACC)
    return ((word + type_).to(SUM).to(ACC) + position).to(Z).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def embedding_layernorm_fwd_kernel(
    words_ptr, positions_ptr, types_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, weight_ptr, bias_ptr, seed_ptr,
    y_ptr, mean_ptr, rstd_ptr,
    words_row_stride, words_col_stride, position_batch_stride, type_batch_stride,
    seqlen, offset, n_words, n_positions, n_types, n_rows,
    N_COLS: tl.constexpr, EPS: tl.constexpr, P_DROP: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, ACC: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = block_rows(tl.program_id(0), BLOCK_M)
    cols = columns(BLOCK_N, VECTOR)
    row_mask = rows < n_rows
    col_mask = cols < N_COLS

    z = summed_rows(
        (words_ptr, positions_ptr, types_ptr), (ids_ptr, position_ids_ptr, type_ids_ptr),
        (words_row_stride, words_col_stride, position_batch_stride, type_batch_stride),
        (seqlen, offset, n_words, n_positions, n_types),
        rows, row_mask, cols[None, :], col_mask[None, :], 1, N_COLS, SUM, Z, ACC,
    )  # fmt: skip
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)

    y, mean, rstd = layernorm(z, weight, bias, col_mask, N_COLS, EPS)
    if P_DROP > 0:
        y = dropout(y, keep_mask(tl.load(seed_ptr), rows[:, None], cols[None, :], P_DROP), P_DROP)

    out = tile_offsets(rows, cols, N_COLS, 1)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), row_mask[:, None] & col_mask[None, :])
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, row_mask)


@triton.jit(do_not_specialize=SIZES)
def embedding_layernorm_bwd_kernel(
    dy_ptr, words_ptr, positions_ptr, types_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, mean_ptr, rstd_ptr, weight_ptr,
    seed_ptr, dz_ptr, sums_ptr, dy_row_stride, dy_col_stride,
    words_row_stride, words_col_stride, position_batch_stride, type_batch_stride,
    seqlen, offset, n_words, n_positions, n_types, n_rows, n_programs,
    N_COLS: tl.constexpr, P_DROP: tl.constexpr, STAGES: tl.constexpr, SUM: tl.constexpr, Z: tl.constexpr, ACC: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = columns_of_chunks(CHUNKS, BLOCK_M, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
    dweight = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dbias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)

    for block in tl.range(program, tl.cdiv(n_rows, BLOCK_M), n_programs, num_stages=STAGES):
        tokens = block_rows(block, BLOCK_M)
        rows = beside_chunks(tokens, CHUNKS)
        mask = (rows < n_rows) & col_mask

        dy = load_upstream(dy_ptr, rows, cols, dy_row_stride, dy_col_stride, mask, col_mask, ACC)
        z = summed_rows(
            (words_ptr, positions_ptr, types_ptr), (ids_ptr, position_ids_ptr, type_ids_ptr),
            (words_row_stride, words_col_stride, position_batch_stride, type_batch_stride),
            (seqlen, offset, n_words, n_positions, n_types),
            tokens, tokens < n_rows, cols, col_mask, CHUNKS, N_COLS, SUM, Z, ACC,
        )  # fmt: skip
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, tokens, n_rows, CHUNKS)

        if P_DROP > 0:
            dy = dropout(dy, keep_mask(tl.load(seed_ptr), rows, cols, P_DROP), P_DROP)
        x_hat = tl.where(col_mask, (z - mean) * rstd, 0.0)
        if sums_ptr is not None:
            dweight += dy * x_hat
            dbias += dy
        if dz_ptr is not None:
            dz = layernorm_backward(dy * weight, x_hat, rstd, N_COLS, CHUNKS)
            tl.store(dz_ptr + offsets(rows, cols, N_COLS, 1), dz.to(dz_ptr.dtype.element_ty), mask)

    if sums_ptr is not None:
        store_sums(sums_ptr, program, (dweight, dbias), 2, N_COLS, CHUNKS, VECTOR)
