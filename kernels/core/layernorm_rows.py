"""What LayerNorm kernels load and store besides their rows: statistics, the upstream gradient, sums over rows.

The backward's functions work on tiles of chunks, see device_math.
"""

import triton
import triton.language as tl

from .device_math import beside_chunks, columns_of_chunks, offsets, sums_of_columns


@triton.jit
def store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, row_mask):
    """Store the statistics; without mean_ptr no backward follows, and nothing is stored."""
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, row_mask)
        tl.store(rstd_ptr + rows, rstd, row_mask)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, rows, n_rows, CHUNKS: tl.constexpr):
    """(mean, rstd) of rows [BLOCK_M], beside each of a row's chunks."""
    mean = beside_chunks(tl.load(mean_ptr + rows, rows < n_rows, other=0.0), CHUNKS)
    rstd = beside_chunks(tl.load(rstd_ptr + rows, rows < n_rows, other=0.0), CHUNKS)
    return mean, rstd


@triton.jit
def load_upstream(dy_ptr, rows, cols, row_stride, col_stride, mask, col_mask, ACC: tl.constexpr):
    dy = tl.load(dy_ptr + offsets(rows, cols, row_stride, col_stride), mask, other=0.0).to(ACC)
    return tl.where(col_mask, dy, 0.0)  # 0 already as loaded; the compiler now drops what is computed past the last column


@triton.jit
def store_sums(sums_ptr, program, tiles, N: tl.constexpr, N_COLS: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr):
    """Store a program's sums over the rows of N tiles, one tile's after the other's: [programs, N, N_COLS]."""
    BLOCK_N: tl.constexpr = tiles[0].shape[1]
    cols = columns_of_chunks(CHUNKS, 1, BLOCK_N, VECTOR)
    row = sums_ptr + program.to(tl.int64) * N * N_COLS + cols
    for i in tl.static_range(N):
        tl.store(row + i * N_COLS, sums_of_columns(tiles[i], CHUNKS), cols < N_COLS)
