"""y = LayerNorm(dropout(x + x_bias) + residual), which follows the products in BertSelfOutput and BertOutput.

x, residual [..., H] with any strides; x_bias, weight, bias [H]. With z = dropout(x + x_bias) + residual:

    forward    y = (z - mean) * rstd * weight + bias        reads x, residual; writes z, y        4THb bytes
    backward   dz = LayerNorm'(dy); dx = dropout'(dz)       reads dy, z; writes dx, dresidual     4THb bytes
               with y (optional): the forward's again       writes y                              1THb bytes more

Saved: z, and mean and rstd per row in float32. The keep mask is recomputed from the seed. Without dropout and with one dtype dx
is dresidual, which the backward writes once. Weight gradients are float32 sums per program, added up in a second pass: no
atomics, the same bits every time.
Layer normalisation: Ba, Kiros and Hinton, arXiv:1607.06450. Dropout bits: device_math.keep_mask.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .core import plain
from .core.autograd import needs_backward
from .core.checks import check_device, check_dtype, check_layernorm
from .core.device_math import (
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
from .core.failures import or_plain
from .core.launch import (
    Work,
    accumulator,
    accumulator_torch,
    as_rows,
    cdiv,
    choose,
    draw_seed,
    next_power_of_2,
    resident_programs,
)
from .core.layernorm_rows import load_statistics, load_upstream, store_statistics, store_sums
from .core.op import define_op
from .core.plain_dropout import dropped
from .core.plain_dropout import keep_mask as plain_keep_mask

__all__ = ["dropout_add_layernorm"]


@triton.jit(do_not_specialize=["n_rows"])
def dropout_add_layernorm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, seed_ptr, y_ptr, y_low_ptr, z_ptr, mean_ptr, rstd_ptr,
    x_row_stride, x_col_stride, residual_row_stride, residual_col_stride, n_rows,
    N_COLS: tl.constexpr, EPS: tl.constexpr, P_DROP: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = block_rows(tl.program_id(0), BLOCK_M)
    cols = columns(BLOCK_N, VECTOR)
    row_mask = rows < n_rows
    col_mask = cols < N_COLS
    mask = row_mask[:, None] & col_mask[None, :]

    x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)
    residual_offsets = tile_offsets(rows, cols, residual_row_stride, residual_col_stride)
    residual = tl.load(residual_ptr + residual_offsets, mask, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)

    if x_bias_ptr is not None:
        x += tl.load(x_bias_ptr + cols, col_mask, other=0.0).to(ACC)[None, :]
    if P_DROP > 0:
        x = dropout(x, keep_mask(tl.load(seed_ptr), rows[:, None], cols[None, :], P_DROP), P_DROP)
    # Rounded as it is saved and as eager rounds it, so that the backward reads the row that the statistics belong to.
    z = (x + residual).to(z_ptr.dtype.element_ty).to(ACC)
    y, mean, rstd = layernorm(z, weight, bias, col_mask, N_COLS, EPS)

    out = tile_offsets(rows, cols, N_COLS, 1)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask)
    if y_low_ptr is not None:  # y again, in the dtype of the next products
        tl.store(y_low_ptr + out, y.to(y_ptr.dtype.element_ty).to(y_low_ptr.dtype.element_ty), mask)
    if mean_ptr is not None:
        tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask)
    store_statistics(mean_ptr, rstd_ptr, mean, rstd, rows, row_mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def dropout_add_layernorm_bwd_kernel(
    dy_ptr, z_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, seed_ptr, dx_ptr, dresidual_ptr, y_ptr, sums_ptr,
    dy_row_stride, dy_col_stride, n_rows, n_programs,
    N_COLS: tl.constexpr, P_DROP: tl.constexpr, STAGES: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = columns_of_chunks(CHUNKS, BLOCK_M, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(ACC)
    dweight = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dbias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)
    dx_bias = tl.zeros([CHUNKS * BLOCK_M, BLOCK_N], ACC)

    for block in tl.range(program, tl.cdiv(n_rows, BLOCK_M), n_programs, num_stages=STAGES):
        row = block_rows(block, BLOCK_M)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, row, n_rows, CHUNKS)
        rows = beside_chunks(row, CHUNKS)
        mask = (rows < n_rows) & col_mask
        here = offsets(rows, cols, N_COLS, 1)

        z = tl.load(z_ptr + here, mask, other=0.0).to(ACC)

        x_hat = tl.where(col_mask, (z - mean) * rstd, 0.0)
        if y_ptr is not None:  # the forward's result, for a backward that did not save it
            y = x_hat * weight + tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)
            tl.store(y_ptr + here, y.to(y_ptr.dtype.element_ty), mask)
        # Only after y is stored, so that its registers are free.
        dy = load_upstream(dy_ptr, rows, cols, dy_row_stride, dy_col_stride, mask, col_mask, ACC)
        dz = layernorm_backward(dy * weight, x_hat, rstd, N_COLS, CHUNKS)
        dx = dz
        if P_DROP > 0:
            dx = dropout(dz, keep_mask(tl.load(seed_ptr), rows, cols, P_DROP), P_DROP)
        if sums_ptr is not None:
            dweight += dy * x_hat
            dbias += dy
            dx_bias += tl.where(col_mask, dx, 0.0)

        tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + here, dz.to(dresidual_ptr.dtype.element_ty), mask)

    if sums_ptr is not None:
        store_sums(sums_ptr, program, (dweight, dbias, dx_bias), 3, N_COLS, CHUNKS, VECTOR)


def forward_work(
    n_rows: int,
    n_cols: int,
    x_strides: tuple[int, int],
    residual_strides: tuple[int, int],
    widest: Tensor,
    z_dtype: torch.dtype,
    eps: float,
    p: float,
) -> Work:
    """The launch for x and residual [n_rows, n_cols]; `widest` has the wider dtype of y and z."""
    config = choose("layernorm_forward", widest, n_cols)
    numbers = {
        "x_row_stride": x_strides[0],
        "x_col_stride": x_strides[1],
        "residual_row_stride": residual_strides[0],
        "residual_col_stride": residual_strides[1],
        "n_rows": n_rows,
        "N_COLS": n_cols,
        "EPS": eps,
        "P_DROP": p,
        "ACC": accumulator(z_dtype),
        "VECTOR": 16 // widest.element_size(),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": next_power_of_2(n_cols),
    }
    return Work(dropout_add_layernorm_fwd_kernel, cdiv(n_rows, config.BLOCK_M) if n_cols else 0, config, numbers)


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    x_bias: Tensor | None
    seed: Tensor | None
    eps: float
    p: float
    out_dtype: torch.dtype
    save: bool


class Saved(NamedTuple):
    z: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    seed: Tensor | None
    p: float
    x_dtype: torch.dtype
    residual_dtype: torch.dtype

    @property
    def shared(self) -> bool:
        """Whether x and the residual have the same gradient."""
        return self.p == 0.0 and self.x_dtype == self.residual_dtype


def _plain_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, x_bias, seed, eps, p, out_dtype, save = inputs
    dtype = torch.promote_types(x.dtype, residual.dtype)
    sum_ = plain.upcast(x) if x_bias is None else plain.upcast(x) + x_bias
    z = (dropped(sum_, plain_keep_mask(seed, x.shape, p), p) + residual).to(dtype).contiguous()
    y, mean, rstd = plain.layernorm(plain.upcast(z), weight, bias, eps, out_dtype)
    return (y, z, mean, rstd) if save else (y, *(t.new_empty(0) for t in (z, mean, rstd)))


@or_plain(_plain_forward)
def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, x_bias, seed, eps, p, _, save = inputs
    y, z, mean, rstd = _allocate_forward(inputs)
    x, residual = as_rows(x), as_rows(residual)
    widest = y if y.element_size() > z.element_size() else z
    work = forward_work(*x.shape, x.stride(), residual.stride(), widest, z.dtype, eps, p)
    work.launch(
        x,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        x_bias_ptr=None if x_bias is None else x_bias.contiguous(),
        seed_ptr=seed,
        y_ptr=y,
        y_low_ptr=None,
        z_ptr=z,  # empty when nothing is saved; its dtype still decides how z is rounded
        mean_ptr=mean if save else None,
        rstd_ptr=rstd if save else None,
    )
    return y, z, mean, rstd


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, save = inputs.x, inputs.save
    z_dtype = torch.promote_types(x.dtype, inputs.residual.dtype)
    y = torch.empty(x.shape, dtype=inputs.out_dtype, device=x.device)
    z = torch.empty(x.shape if save else (0,), dtype=z_dtype, device=x.device)
    mean = torch.empty(x.shape[:-1] if save else (0,), dtype=accumulator_torch(z_dtype), device=x.device)
    return y, z, mean, torch.empty_like(mean)


def backward_work(
    n_rows: int, n_cols: int, dy_strides: tuple[int, int], widest: Tensor, z_dtype: torch.dtype, p: float
) -> Work:
    """The launch for dy and z [n_rows, n_cols]; `widest` has the wider dtype. Each program writes a row of sums."""
    config = choose("layernorm_backward", widest, n_cols)
    programs = resident_programs(config, widest, cdiv(n_rows, config.BLOCK_M))
    chunks, block_n = config.chunks(n_cols)
    numbers = {
        "dy_row_stride": dy_strides[0],
        "dy_col_stride": dy_strides[1],
        "n_rows": n_rows,
        "n_programs": programs,
        "N_COLS": n_cols,
        "P_DROP": p,
        "STAGES": config.num_stages,
        "ACC": accumulator(z_dtype),
        "VECTOR": 16 // widest.element_size(),
        "BLOCK_M": config.BLOCK_M,
        "CHUNKS": chunks,
        "BLOCK_N": block_n,
    }
    return Work(dropout_add_layernorm_bwd_kernel, programs if n_rows * n_cols else 0, config, numbers)


def _plain_backward(dy: Tensor, saved: Saved, apart: bool, sum_columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, rstd, weight, seed, p, x_dtype, residual_dtype = saved
    dz, dweight, dbias = plain.layernorm_backward(dy, plain.upcast(z), mean, rstd, weight)
    dx = dropped(dz, plain_keep_mask(seed, z.shape, p), p)
    dresidual = dz.to(residual_dtype) if apart else dz.new_empty(0, dtype=residual_dtype)
    return dx.to(x_dtype).contiguous(), dresidual.contiguous(), torch.stack([dweight, dbias, plain.column_sum(dx)])


@or_plain(_plain_backward)
def launch_backward(dy: Tensor, saved: Saved, apart: bool, sum_columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the residual (if it is asked for `apart` from x's) and of the vectors, [3, H]."""
    z, mean, rstd, weight, seed, p, _, _ = saved
    dx, dresidual, _ = _allocate_backward(dy, saved, apart, sum_columns)
    dy = as_rows(dy)
    n_rows, n_cols = dy.shape
    widest = dy if dy.element_size() > z.element_size() else z
    work = backward_work(n_rows, n_cols, dy.stride(), widest, z.dtype, p)
    sums = mean.new_empty(work.programs, 3, n_cols) if sum_columns and dy.numel() else mean.new_zeros(1, 3, n_cols)
    work.launch(
        dy,
        dy_ptr=dy,
        z_ptr=z,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight.contiguous(),
        bias_ptr=None,
        seed_ptr=seed,
        dx_ptr=dx,
        dresidual_ptr=dresidual if apart else None,
        y_ptr=None,
        sums_ptr=sums if sum_columns else None,
    )
    return dx, dresidual, sums.sum(0)


def _allocate_backward(dy: Tensor, saved: Saved, apart: bool, sum_columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    z = saved.z
    dx = torch.empty(z.shape, dtype=saved.x_dtype, device=z.device)
    dresidual = torch.empty(z.shape if apart else (0,), dtype=saved.residual_dtype, device=z.device)
    return dx, dresidual, saved.mean.new_empty(3, z.shape[-1])


def _save(inputs: Inputs, y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Saved:
    return Saved(z, mean, rstd, inputs.weight, inputs.seed, inputs.p, inputs.x.dtype, inputs.residual.dtype)


def _gradients(backward, dy: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    apart = needs.residual and not saved.shared
    dx, dresidual, vectors = backward(dy, saved, apart, needs.weight or needs.bias or needs.x_bias)
    dweight, dbias, dx_bias = vectors.unbind()
    residual = dx if saved.shared else dresidual
    return {"x": dx, "residual": residual, "weight": dweight, "bias": dbias, "x_bias": dx_bias}


_call = define_op(
    "dropout_add_layernorm", (launch_forward, _allocate_forward), (launch_backward, _allocate_backward), _save, _gradients
)


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) in one pass over memory.

    Args:
        x: [..., H], a product without its bias. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        residual: [..., H], the shape of x; another dtype promotes the sum as torch does.
        weight, bias: [H], LayerNorm's.
        x_bias: [H], the bias of the product, or None.
        eps: added to the variance.
        p: probability of dropping an element, rounded to 1/65536; kept elements are scaled by 1 / (1 - p).
        out_dtype: dtype of the result (autocast asks for float32); the promoted dtype by default.
        seed: int64 [] on x's device; drawn from torch's generator when None and p > 0.

    Returns:
        [..., H], contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype without a kernel, p outside [0, 1], H over 8192.
    """
    check_layernorm(x, weight, bias, x_bias)
    check_dtype("residual", residual)
    check_device("residual", residual, x)
    check_device("seed", seed, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    out_dtype = out_dtype or torch.promote_types(x.dtype, residual.dtype)
    save = needs_backward(x, residual, weight, bias, x_bias)
    seed = seed if p > 0.0 else None
    return _call(Inputs(x, residual, weight, bias, x_bias, seed, eps, p, out_dtype, save))[0]
