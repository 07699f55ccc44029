"""y = LayerNorm(activation(x + x_bias)), which follows the product in BertPredictionHeadTransform.

x [..., H] with any strides; x_bias, weight, bias [H]:

    forward    reads x; writes y            2THb bytes
    backward   reads dy, x; writes dx       3THb bytes; the activation is recomputed

Saved: x itself, and mean and rstd per row in float32. Weight gradients are float32 sums per program, added up and cast in a
second launch: no atomics. Layer normalisation: Ba, Kiros and Hinton, arXiv:1607.06450.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core import column_sums, plain
from .core.autograd import needs_backward
from .core.checks import check_activation, check_layernorm
from .core.device_math import activation as activate
from .core.device_math import (
    activation_backward,
    beside_chunks,
    block_rows,
    columns,
    columns_of_chunks,
    layernorm,
    layernorm_backward,
    offsets,
    tile_offsets,
)
from .core.failures import or_plain
from .core.launch import accumulator, accumulator_torch, as_rows, choose, launch, resident_programs
from .core.layernorm_rows import load_statistics, load_upstream, store_statistics, store_sums
from .core.op import define_op

__all__ = ["gelu_layernorm"]


@triton.jit(do_not_specialize=["n_rows"])
def gelu_layernorm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, x_bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_row_stride, x_col_stride, n_rows,
    N_COLS: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    rows = block_rows(tl.program_id(0), BLOCK_M)
    cols = columns(BLOCK_N, VECTOR)
    row_mask = rows < n_rows
    col_mask = cols < N_COLS
    mask = row_mask[:, None] & col_mask[None, :]

    x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)
    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + cols, col_mask, other=0.0).to(ACC)[None, :]

    activated = activate(x, ACTIVATION, EXACT)  # 0 past the last column, because x is
    y, mean, rstd = layernorm(activated, weight, bias, col_mask, N_COLS, EPS)

    tl.store(y_ptr + tile_offsets(rows, cols, N_COLS, 1), y.to(y_ptr.dtype.element_ty), mask)
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def gelu_layernorm_bwd_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, x_bias_ptr, dx_ptr, sums_ptr,
    dy_row_stride, dy_col_stride, x_row_stride, x_col_stride, n_rows, n_programs,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    program = tl.program_id(0)
    cols = columns_of_chunks(CHUNKS, BLOCK_M, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    dweight = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dbias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dx_bias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)

    for block in tl.range(program, tl.cdiv(n_rows, BLOCK_M), n_programs, num_stages=STAGES):
        row = block_rows(block, BLOCK_M)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, row, n_rows, CHUNKS)
        rows = beside_chunks(row, CHUNKS)
        mask = (rows < n_rows) & col_mask

        dy = load_upstream(dy_ptr, rows, cols, dy_row_stride, dy_col_stride, mask, col_mask, ACC)
        x = tl.load(x_ptr + offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)

        # Reloaded for every row, from the cache: five tiles of sums and gradients leave no registers for them.
        weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
        if x_bias_ptr is not None:
            x += tl.load(x_bias_ptr + cols, col_mask, other=0.0).to(ACC)
        x_hat = tl.where(col_mask, (activate(x, ACTIVATION, EXACT) - mean) * rstd, 0.0)
        dactivated = layernorm_backward(dy * weight, x_hat, rstd, N_COLS, CHUNKS)
        dx = activation_backward(dactivated, x, ACTIVATION, EXACT)
        if sums_ptr is not None:
            dweight += dy * x_hat
            dbias += dy
            dx_bias += tl.where(col_mask, dx, 0.0)

        tl.store(dx_ptr + offsets(rows, cols, N_COLS, 1), dx.to(dx_ptr.dtype.element_ty), mask)

    if sums_ptr is not None:
        store_sums(sums_ptr, program, (dweight, dbias, dx_bias), 3, N_COLS, CHUNKS, VECTOR)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    x_bias: Tensor | None
    activation: str
    eps: float
    out_dtype: torch.dtype
    save: bool


class Saved(NamedTuple):
    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    x_bias: Tensor | None
    activation: str
    bias_dtype: torch.dtype

    @property
    def sums_dtype(self) -> torch.dtype:
        """The dtype of the vectors' gradients: the vectors' own if they share one, so that the final sum rounds to it."""
        dtypes = {self.weight.dtype, self.bias_dtype, self.weight.dtype if self.x_bias is None else self.x_bias.dtype}
        return dtypes.pop() if len(dtypes) == 1 else self.mean.dtype


def _plain_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, x_bias, activation, eps, out_dtype, save = inputs
    a = reference.bias_gelu(plain.upcast(x), x_bias, activation=activation)
    y, mean, rstd = plain.layernorm(a, weight, bias, eps, out_dtype)
    return (y, mean, rstd) if save else (y, mean.new_empty(0), mean.new_empty(0))


@or_plain(_plain_forward)
def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, x_bias, activation, eps, _, save = inputs
    y, mean, rstd = _allocate_forward(inputs)
    x = as_rows(x)
    n_rows, n_cols = x.shape
    widest = y if y.element_size() > x.element_size() else x
    config = choose("layernorm_forward", widest, n_cols)
    launch(
        gelu_layernorm_fwd_kernel,
        triton.cdiv(n_rows, config.BLOCK_M) if n_cols else 0,
        config,
        x,
        x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        x_bias_ptr=None if x_bias is None else x_bias.contiguous(),
        y_ptr=y,
        mean_ptr=mean if save else None,
        rstd_ptr=rstd if save else None,
        x_row_stride=x.stride(0),
        x_col_stride=x.stride(1),
        n_rows=n_rows,
        N_COLS=n_cols,
        EPS=eps,
        ACTIVATION=activation,
        ACC=accumulator(x.dtype),
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=triton.next_power_of_2(n_cols),
    )
    return y, mean, rstd


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs.x
    y = torch.empty(x.shape, dtype=inputs.out_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1] if inputs.save else (0,), dtype=accumulator_torch(x.dtype), device=x.device)
    return y, mean, torch.empty_like(mean)


def _plain_backward(dy: Tensor, saved: Saved, sum_columns: bool) -> tuple[Tensor, Tensor]:
    x, mean, rstd, weight, x_bias, activation, _ = saved
    inner = plain.upcast(x) if x_bias is None else plain.upcast(x) + x_bias
    a = reference.ACTIVATIONS[activation](inner)
    da, dweight, dbias = plain.layernorm_backward(dy, a, mean, rstd, weight)
    dx = plain.activation_backward(da, inner, activation)
    return dx.to(x.dtype).contiguous(), torch.stack([dweight, dbias, plain.column_sum(dx)]).to(saved.sums_dtype)


@or_plain(_plain_backward)
def launch_backward(dy: Tensor, saved: Saved, sum_columns: bool) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight, bias and x_bias, [3, H]."""
    x, mean, rstd, weight, x_bias, activation, _ = saved
    dx, vectors = _allocate_backward(dy, saved, sum_columns)
    if not x.numel():
        return dx, vectors.zero_()
    dy, x = as_rows(dy), as_rows(x)
    n_rows, n_cols = x.shape
    widest = dy if dy.element_size() > x.element_size() else x
    config = choose("gelu_layernorm_backward", widest, n_cols)
    programs = resident_programs(config, x, triton.cdiv(n_rows, config.BLOCK_M))
    chunks, block_n = config.chunks(n_cols)
    sums = mean.new_empty(programs, 3, n_cols) if sum_columns else None
    launch(
        gelu_layernorm_bwd_kernel,
        programs,
        config,
        x,
        dy_ptr=dy,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight.contiguous(),
        x_bias_ptr=None if x_bias is None else x_bias.contiguous(),
        dx_ptr=dx,
        sums_ptr=sums,
        dy_row_stride=dy.stride(0),
        dy_col_stride=dy.stride(1),
        x_row_stride=x.stride(0),
        x_col_stride=x.stride(1),
        n_rows=n_rows,
        n_programs=programs,
        N_COLS=n_cols,
        ACTIVATION=activation,
        STAGES=config.num_stages,
        ACC=accumulator(x.dtype),
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        CHUNKS=chunks,
        BLOCK_N=block_n,
    )
    if sums is None:
        vectors.zero_()
    else:
        work = column_sums.work((programs, 0, 0), (3 * n_cols, 0, 0), sums)
        work.launch(sums, a_ptr=sums, b_ptr=sums, c_ptr=sums, out_ptr=vectors)
    return dx, vectors


def _allocate_backward(dy: Tensor, saved: Saved, sum_columns: bool) -> tuple[Tensor, Tensor]:
    x = saved.x
    vectors = saved.weight.new_empty(3, x.shape[-1], dtype=saved.sums_dtype)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), vectors


def _save(inputs: Inputs, y: Tensor, mean: Tensor, rstd: Tensor) -> Saved:
    return Saved(inputs.x, mean, rstd, inputs.weight, inputs.x_bias, inputs.activation, inputs.bias.dtype)


def _gradients(backward, dy: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    dx, vectors = backward(dy, saved, needs.weight or needs.bias or needs.x_bias)
    dweight, dbias, dx_bias = vectors.unbind()
    return {"x": dx, "weight": dweight, "bias": dbias, "x_bias": dx_bias}


_call = define_op(
    "gelu_layernorm", (launch_forward, _allocate_forward), (launch_backward, _allocate_backward), _save, _gradients
)


def gelu_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(activation(x + x_bias)) in one pass over memory.

    Args:
        x: [..., H], a product without its bias. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        weight, bias: [H], LayerNorm's.
        x_bias: [H], the bias of the product, or None.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        eps: added to the variance.
        out_dtype: dtype of the result (autocast asks for float32); the dtype of x by default.

    Returns:
        [..., H], contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype or an activation without a kernel, H over 8192.
    """
    check_layernorm(x, weight, bias, x_bias)
    check_activation(activation)
    save = needs_backward(x, weight, bias, x_bias)
    call = _call if save or torch.compiler.is_compiling() else launch_forward
    return call(Inputs(x, weight, bias, x_bias, activation, eps, out_dtype or x.dtype, save))[0]
