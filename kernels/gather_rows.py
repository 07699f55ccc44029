"""y[i] = x[index[i]], and zeros where index[i] is negative: from rows of a padded batch to packed rows, and back.

x [R, H] with any strides, index [N], inverse [R] (the place of each row of x in index, negative if it has none):

    forward    reads and writes the rows that are taken: 2NHb bytes
    backward   the same with the two indices exchanged

Saved: the indices only. No atomics: every row goes to at most one place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core.autograd import needs_backward
from .core.checks import check_device, check_dtype
from .core.device_math import block_rows, place_of_tile, tile_offsets
from .core.failures import or_plain
from .core.launch import cdiv, choose, launch
from .core.op import define_op

__all__ = ["gather_rows"]


@triton.jit(do_not_specialize=["n_rows"])
def gather_rows_kernel(
    x_ptr, index_ptr, y_ptr, x_row_stride, x_col_stride, n_rows,
    N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, BLOCK_N)
    rows = block_rows(block, BLOCK_M)
    row_mask, col_mask = rows < n_rows, cols < N_COLS

    sources = tl.load(index_ptr + rows, row_mask, other=-1)
    taken = (sources >= 0)[:, None] & col_mask[None, :]
    x = tl.load(x_ptr + tile_offsets(sources, cols, x_row_stride, x_col_stride), taken, other=0.0)
    tl.store(y_ptr + tile_offsets(rows, cols, N_COLS, 1), x, row_mask[:, None] & col_mask[None, :])


class Inputs(NamedTuple):
    x: Tensor
    index: Tensor
    inverse: Tensor


class Saved(NamedTuple):
    index: Tensor
    inverse: Tensor


def _plain(inputs: Inputs) -> Tensor:
    if not inputs.x.shape[0]:
        return torch.zeros_like(_allocate(inputs))
    return reference.gather_rows(*inputs).contiguous()


@or_plain(_plain)
def launch_rows(inputs: Inputs) -> Tensor:
    x, index, _ = inputs
    y = _allocate(inputs)
    n_rows, n_cols = y.shape
    config = choose("gather_rows", x, n_cols)
    launch(
        gather_rows_kernel,
        cdiv(n_rows, config.BLOCK_M) * cdiv(n_cols, config.BLOCK_N),
        config,
        x,
        x_ptr=x,
        index_ptr=index,
        y_ptr=y,
        x_row_stride=x.stride(0),
        x_col_stride=x.stride(1),
        n_rows=n_rows,
        N_COLS=n_cols,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return y


def _allocate(inputs: Inputs) -> Tensor:
    return inputs.x.new_empty((inputs.index.shape[0], inputs.x.shape[1]))


def _save(inputs: Inputs, y: Tensor) -> Saved:
    return Saved(inputs.index, inputs.inverse)


def _gradients(backward, dy: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    return {"x": backward(Inputs(dy, saved.inverse, saved.index))}


_call = define_op("gather_rows", (launch_rows, _allocate), save=_save, gradients=_gradients)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Row index[i] of x as row i, zeros where index[i] is negative.

    Args:
        x: [R, H]. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        index: int32 [N], below R. No row of x may occur twice.
        inverse: int32 [R], the place of each row of x: inverse[index[i]] == i, negative for rows that index leaves out.

    Returns:
        [N, H], contiguous, the dtype of x.

    Raises:
        ValueError: an x that is not [R, H], a dtype without a kernel, indices that are not int32 vectors on x's device.
    """
    check_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [R, H], got {tuple(x.shape)}")
    for name, vector, length in (("index", index, None), ("inverse", inverse, x.shape[0])):
        if vector.dtype != torch.int32 or vector.dim() != 1 or (length is not None and vector.shape[0] != length):
            expected = "[N]" if length is None else f"[{length}]"
            raise ValueError(f"{name}: expected int32 {expected}, got {vector.dtype} {tuple(vector.shape)}")
        check_device(name, vector, x)
    index, inverse = index.contiguous(), inverse.contiguous()
    if torch.compiler.is_compiling() or needs_backward(x):
        return _call(Inputs(x, index, inverse))
    return launch_rows(Inputs(x, index, inverse))
