"""The end of a sum over rows: adds up what programs left of up to three tensors' columns, and casts it, in one launch.

Kernels that sum columns write a float32 row a program instead of adding to one place: no atomics, the same bits each time.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device_math import block_rows
from .launch import Work, accumulator, cdiv, choose

__all__ = ["work"]


@triton.jit(do_not_specialize=["a_rows", "b_rows", "c_rows"])
def column_sums_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    a_rows,
    b_rows,
    c_rows,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [A + B + C], the sums over rows of a [a_rows, A], b [b_rows, B] and c [c_rows, C] side by side."""
    a_blocks: tl.constexpr = (A + BLOCK_N - 1) // BLOCK_N
    b_blocks: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0).to(tl.int64)
    here = a_ptr
    width = A
    rows = a_rows.to(tl.int64)
    if block >= a_blocks + b_blocks:
        block -= a_blocks + b_blocks
        here = c_ptr
        width = C
        rows = c_rows.to(tl.int64)
        out_ptr += A + B
    elif block >= a_blocks:
        block -= a_blocks
        here = b_ptr
        width = B
        rows = b_rows.to(tl.int64)
        out_ptr += A
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < width
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(0, tl.cdiv(rows, BLOCK_M)):
        row = block_rows(tile, BLOCK_M)
        mask = (row < rows)[:, None] & col_mask[None, :]
        total += tl.load(here + row[:, None] * width + cols[None, :], mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), col_mask)


def work(rows: tuple[int, int, int], widths: tuple[int, int, int], like: Tensor) -> Work:
    """Of three tensors of the dtype of `like`, the one that is added up in."""
    config = choose("column_sums", like, max(widths))
    numbers = {
        "a_rows": rows[0],
        "b_rows": rows[1],
        "c_rows": rows[2],
        "A": widths[0],
        "B": widths[1],
        "C": widths[2],
        "ACC": accumulator(like.dtype),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
    }
    return Work(column_sums_kernel, sum(cdiv(width, config.BLOCK_N) for width in widths), config, numbers)
