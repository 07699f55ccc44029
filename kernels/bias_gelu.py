"""y = activation(x + bias), which follows the product in BertIntermediate. Exact erf GELU by default.

x [..., F] with any strides, bias [F]:

    forward    reads x; writes y            2TFb bytes
    backward   reads dy, x; writes dx       3TFb bytes; the bias gradient is summed in the same pass
               with y (optional)            1TFb bytes more: the forward's result again

Saved: x itself, without a copy. The bias gradient is one float32 sum per program, added up in a second pass: no atomics.
GELU: Hendrycks and Gimpel, arXiv:1606.08415.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core import plain
from .core.checks import check_activation, check_dtype, check_vector
from .core.device_math import activation as activate
from .core.device_math import activation_backward, block_rows, place_of_tile, tile_offsets
from .core.failures import or_plain
from .core.launch import Work, accumulator, accumulator_torch, as_rows, cdiv, choose, resident_programs
from .core.op import define_op

__all__ = ["bias_gelu"]


@triton.jit(do_not_specialize=["n_rows"])
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, x_row_stride, x_col_stride, n_rows,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, BLOCK_N)
    rows = block_rows(block, BLOCK_M)
    col_mask = cols < N_COLS
    mask = (rows < n_rows)[:, None] & col_mask[None, :]

    x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)[None, :]

    y = activate(x, ACTIVATION, EXACT)
    tl.store(y_ptr + tile_offsets(rows, cols, N_COLS, 1), y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n_rows", "n_row_programs"])
def bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, y_ptr, sums_ptr,
    dy_row_stride, dy_col_stride, x_row_stride, x_col_stride, n_rows, n_row_programs,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    row_program, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, BLOCK_N)
    col_mask = cols < N_COLS
    bias = tl.zeros([BLOCK_N], ACC)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)
    dbias = tl.zeros([BLOCK_N], ACC)

    for block in range(row_program, tl.cdiv(n_rows, BLOCK_M), n_row_programs):
        rows = block_rows(block, BLOCK_M)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]

        dy = tl.load(dy_ptr + tile_offsets(rows, cols, dy_row_stride, dy_col_stride), mask, other=0.0).to(ACC)
        x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)

        x += bias[None, :]
        dx = activation_backward(dy, x, ACTIVATION, EXACT)
        if sums_ptr is not None:
            dbias += tl.sum(dx, axis=0)  # 0 in rows past the last, because dy is
        out = tile_offsets(rows, cols, N_COLS, 1)
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask)  # dx may overwrite dy
        if y_ptr is not None:  # the forward's result, for a backward that did not save it
            tl.store(y_ptr + out, activate(x, ACTIVATION, EXACT).to(y_ptr.dtype.element_ty), mask)

    if sums_ptr is not None:
        tl.store(sums_ptr + row_program.to(tl.int64) * N_COLS + cols, dbias, col_mask)


def forward_work(n_rows: int, n_cols: int, strides: tuple[int, int], like: Tensor, activation: str) -> Work:
    """The launch for x [n_rows, n_cols] of the dtype and device of `like`."""
    config = choose("bias_gelu_forward", like, n_cols)
    numbers = {
        "x_row_stride": strides[0],
        "x_col_stride": strides[1],
        "n_rows": n_rows,
        "N_COLS": n_cols,
        "ACTIVATION": activation,
        "ACC": accumulator(like.dtype),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
    }
    return Work(bias_gelu_fwd_kernel, cdiv(n_rows, config.BLOCK_M) * cdiv(n_cols, config.BLOCK_N), config, numbers)


class Inputs(NamedTuple):
    x: Tensor
    bias: Tensor | None
    activation: str


def plain_forward(inputs: Inputs) -> Tensor:
    x, bias, activation = inputs
    return reference.bias_gelu(plain.upcast(x), bias, activation=activation).to(x.dtype).contiguous()


@or_plain(plain_forward)
def launch_forward(inputs: Inputs) -> Tensor:
    x, bias, activation = inputs
    y = _allocate_forward(inputs)
    x = as_rows(x)
    work = forward_work(*x.shape, x.stride(), x, activation)
    work.launch(x, x_ptr=x, bias_ptr=None if bias is None else bias.contiguous(), y_ptr=y)
    return y


def _allocate_forward(inputs: Inputs) -> Tensor:
    return torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)


def backward_work(
    n_rows: int, n_cols: int, dy_strides: tuple[int, int], x_strides: tuple[int, int], like: Tensor, activation: str
) -> tuple[Work, int]:
    """The launch for dy and x [n_rows, n_cols], and the number of rows of sums that it writes."""
    config = choose("bias_gelu_backward", like, n_cols)
    col_blocks, row_blocks = cdiv(n_cols, config.BLOCK_N), cdiv(n_rows, config.BLOCK_M)
    row_programs = cdiv(resident_programs(config, like, row_blocks * col_blocks), max(col_blocks, 1))
    numbers = {
        "dy_row_stride": dy_strides[0],
        "dy_col_stride": dy_strides[1],
        "x_row_stride": x_strides[0],
        "x_col_stride": x_strides[1],
        "n_rows": n_rows,
        "n_row_programs": row_programs,
        "N_COLS": n_cols,
        "ACTIVATION": activation,
        "ACC": accumulator(like.dtype),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
    }
    rows_of_sums = row_programs if n_rows else 0
    return Work(bias_gelu_bwd_kernel, rows_of_sums * col_blocks, config, numbers), rows_of_sums


def plain_backward(dy: Tensor, saved: Inputs, sum_columns: bool) -> tuple[Tensor, Tensor]:
    x, bias, activation = saved
    inner = plain.upcast(x) if bias is None else plain.upcast(x) + bias
    dx = plain.activation_backward(plain.upcast(dy), inner, activation)
    return dx.to(x.dtype).contiguous(), plain.column_sum(dx)


@or_plain(plain_backward)
def launch_backward(dy: Tensor, saved: Inputs, sum_columns: bool) -> tuple[Tensor, Tensor]:
    x, bias, activation = saved
    dx, _ = _allocate_backward(dy, saved, sum_columns)
    dy, x = as_rows(dy), as_rows(x)
    work, row_programs = backward_work(*x.shape, dy.stride(), x.stride(), x, activation)
    dtype = accumulator_torch(x.dtype)
    allocate, rows = (x.new_empty, row_programs) if sum_columns and x.numel() else (x.new_zeros, 1)
    sums = allocate(rows, x.shape[1], dtype=dtype)
    work.launch(
        x,
        dy_ptr=dy,
        x_ptr=x,
        bias_ptr=None if bias is None else bias.contiguous(),
        dx_ptr=dx,
        y_ptr=None,
        sums_ptr=sums if sum_columns else None,
    )
    return dx, sums.sum(0)


def _allocate_backward(dy: Tensor, saved: Inputs, sum_columns: bool) -> tuple[Tensor, Tensor]:
    x = saved.x
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, x.new_empty(x.shape[-1], dtype=accumulator_torch(x.dtype))


def _save(inputs: Inputs, y: Tensor) -> Inputs:
    return inputs


def _gradients(backward, dy: Tensor, saved: Inputs, needs: Inputs) -> dict[str, Tensor]:
    dx, dbias = backward(dy, saved, needs.bias)
    return {"x": dx, "bias": dbias}


_call = define_op("bias_gelu", (launch_forward, _allocate_forward), (launch_backward, _allocate_backward), _save, _gradients)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """activation(x + bias) in one pass over memory.

    Args:
        x: [..., F], a product without its bias. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        bias: [F], or None.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., F], contiguous, the dtype of x.

    Raises:
        ValueError: a bias of another length or on another device, a dtype or an activation without a kernel.
    """
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected [..., F], got a tensor without dimensions")
    check_vector("bias", bias, x)
    check_activation(activation)
    return _call(Inputs(x, bias, activation))
