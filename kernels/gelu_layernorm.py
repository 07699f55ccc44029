"""y = LayerNorm(activation(x + x_bias)): what follows the product in BertPredictionHeadTransform.

x [..., H] with any strides; x_bias, weight, bias [H]:

    forward    reads x; writes y            2THb bytes
    backward   reads dy, x; writes dx       3THb bytes; the activation is computed again

Saved: x itself, and a row's mean and rstd in float32. Weight gradients are sums a program in float32, added up and cast in
a second launch: no atomics. Layer normalisation: Ba, Kiros and Hinton, arXiv:1607.06450.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .core import column_sums, plain
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
from .core.launch import (
    accumulator,
    accumulator_torch,
    as_rows,
    check_activation,
    check_layernorm,
    choose,
    differentiable,
    launch,
    needs_backward,
    resident_programs,
)
from .core.layernorm_rows import load_statistics, load_upstream, store_statistics, store_sums

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

    activated = activate(x, ACTIVATION, EXACT)  # 0 past the last column, as x is
    y, mean, rstd = layernorm(activated, weight, bias, col_mask, N_COLS, EPS)

    tl.store(y_ptr + tile_offsets(rows, cols, N_COLS, 1), y.to(y_ptr.dtype.element_ty), mask)
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def gelu_layernorm_bwd_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, x_bias_ptr, dx_ptr, sums_ptr,
    dy_row_stride, dy_col_stride, x_row_stride, x_col_stride, n_rows, n_programs,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    program = tl.program_id(0)
    cols = columns_of_chunks(CHUNKS, BLOCK_M, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    dweight = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dbias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dx_bias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)

    for block in range(program, tl.cdiv(n_rows, BLOCK_M), n_programs):
        row = block_rows(block, BLOCK_M)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, row, n_rows, CHUNKS)
        rows = beside_chunks(row, CHUNKS)
        mask = (rows < n_rows) & col_mask

        dy = load_upstream(dy_ptr, rows, cols, dy_row_stride, dy_col_stride, mask, col_mask, ACC)
        x = tl.load(x_ptr + offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)

        # Loaded again for every row, from the cache: five tiles of sums and gradients leave no registers for them.
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


@or_plain(plain.gelu_layernorm)
def _launch_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _allocate_fwd(x, weight, bias, x_bias, activation, eps, out_dtype, save)
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


def _allocate_fwd(x, weight, bias, x_bias, activation, eps, out_dtype, save):
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1] if save else (0,), dtype=accumulator_torch(x.dtype), device=x.device)
    return y, mean, torch.empty_like(mean)


@or_plain(plain.gelu_layernorm_backward)
def _launch_bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    activation: str,
    sum_columns: bool,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dx, vectors = _allocate_bwd(dy, x, mean, rstd, weight, x_bias, activation, sum_columns, sums_dtype)
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


def _allocate_bwd(dy, x, mean, rstd, weight, x_bias, activation, sum_columns, sums_dtype):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(3, x.shape[-1], dtype=sums_dtype)


def _save(ctx, inputs, output):
    x, weight, bias, x_bias, activation, _, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, x_bias)
    ctx.activation = activation
    ctx.bias_dtype = bias.dtype


def _gradients(backward, ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    x, mean, rstd, weight, x_bias = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_x_bias = ctx.needs_input_grad[:4]
    sum_columns = needs_weight or needs_bias or needs_x_bias
    dtypes = {weight.dtype, ctx.bias_dtype, weight.dtype if x_bias is None else x_bias.dtype}
    sums_dtype = dtypes.pop() if len(dtypes) == 1 else mean.dtype  # cast where they are added up, if that is one cast
    dx, vectors = backward(dy, x, mean, rstd, weight, x_bias, ctx.activation, sum_columns, sums_dtype)
    dweight, dbias, dx_bias = vectors.unbind()
    return (
        dx if needs_x else None,
        dweight.to(weight.dtype) if needs_weight else None,
        dbias.to(ctx.bias_dtype) if needs_bias else None,
        dx_bias.to(x_bias.dtype) if needs_x_bias else None,
        *(None,) * 4,
    )


_op = torch.library.custom_op("fastbert::gelu_layernorm", _launch_fwd, mutates_args=())
_op.register_fake(_allocate_fwd)
_backward_op = torch.library.custom_op("fastbert::gelu_layernorm_backward", _launch_bwd, mutates_args=())
_backward_op.register_fake(_allocate_bwd)
_call = differentiable(_launch_fwd, _launch_bwd, _save, _gradients, _op, _backward_op)


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
        x: [..., H], the product whose bias was left out. fp64, fp32, fp16 or bf16, any strides.
        weight, bias: [H], LayerNorm's.
        x_bias: [H], the bias of the product, or None.
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
        eps: added to the variance.
        out_dtype: dtype of the result (autocast asks for float32); the dtype of x by default.

    Returns:
        [..., H], contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype or an activation that has no kernel, H over 8192.
    """
    check_layernorm(x, weight, bias, x_bias)
    check_activation(activation)
    save = needs_backward(x, weight, bias, x_bias)
    call = _call if save or torch.compiler.is_compiling() else _launch_fwd
    return call(x, weight, bias, x_bias, activation, eps, out_dtype or x.dtype, save)[0]
