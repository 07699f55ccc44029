"""The final reduction of column sums: adds up the partial sums of up to five tensors and casts the results, in one launch.

Kernels that sum over rows write one float32 row per program instead of adding to one place: no atomics, and the same bits
every time.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .device_math import block_rows
from .launch import Work, accumulator, cdiv, choose

__all__ = ["work"]


_PARTS = "abcde"


@triton.jit
def _next(block, out_ptr, here, width, rows, next_ptr, NEXT: tl.constexpr, next_rows, BLOCK_N: tl.constexpr):
    """The next tensor if `block` lies behind the last block of the current one, which is at `here`."""
    if block >= tl.cdiv(width, BLOCK_N):
        block -= tl.cdiv(width, BLOCK_N)
        out_ptr += width
        here = next_ptr
        width = NEXT
        rows = next_rows
    return block, out_ptr, here, width, rows


@triton.jit(do_not_specialize=[f"{part}_rows" for part in _PARTS])
def column_sums_kernel(
    out_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    a_rows,
    b_rows,
    c_rows,
    d_rows,
    e_rows,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [A + B + ...]: the column sums of a [a_rows, A], b [b_rows, B] and so on, side by side."""
    block = tl.program_id(0)
    here = a_ptr
    width = A
    rows = a_rows
    if b_ptr is not None:
        block, out_ptr, here, width, rows = _next(block, out_ptr, here, width, rows, b_ptr, B, b_rows, BLOCK_N)
    if c_ptr is not None:
        block, out_ptr, here, width, rows = _next(block, out_ptr, here, width, rows, c_ptr, C, c_rows, BLOCK_N)
    if d_ptr is not None:
        block, out_ptr, here, width, rows = _next(block, out_ptr, here, width, rows, d_ptr, D, d_rows, BLOCK_N)
    if e_ptr is not None:
        block, out_ptr, here, width, rows = _next(block, out_ptr, here, width, rows, e_ptr, E, e_rows, BLOCK_N)
    cols = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < width
    rows = rows.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(0, tl.cdiv(rows, BLOCK_M)):
        row = block_rows(tile, BLOCK_M)
        mask = (row < rows)[:, None] & col_mask[None, :]
        total += tl.load(here + row[:, None] * width + cols[None, :], mask, other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), col_mask)


def work(rows: Sequence[int], widths: Sequence[int], like: Tensor) -> Work:
    """The launch for one to five tensors of the dtype of `like`, which is also the dtype of the accumulator."""
    config = choose("column_sums", like, max(widths))
    numbers: dict[str, Any] = {"ACC": accumulator(like.dtype), "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    for i, part in enumerate(_PARTS):
        here = i < len(rows)
        numbers |= {f"{part}_rows": rows[i] if here else 0, part.upper(): widths[i] if here else 0}
        if not here:
            numbers[f"{part}_ptr"] = None
    return Work(column_sums_kernel, sum(cdiv(width, config.BLOCK_N) for width in widths), config, numbers)
