"""y[b] = the mean, a weighted mean or the largest of the token rows of sequence b, on packed rows.

x [T, H] with any strides, cu_seqlens [>= B + 1], the rows r(t) in {0, 1} that count, and w(t) the position of row t in its
sequence, from 1:

    mean       y = sum(r x) / sum(r)               dx = r dy / sum(r)
    sqrt       y = sum(r x) / sqrt(sum(r))         dx = r dy / sqrt(sum(r))
    weighted   y = sum(r w x) / sum(r w)           dx = r w dy / sum(r w)
    max        y = the largest x with r = 1        dx = dy in the first such row, else 0

    forward    reads the rows that count: THb bytes
    backward   writes every row of dx: THb bytes

Saved: the scale of each sequence (float32 [B]) for the sums, the row of each largest element (int32 [B, H]) for max. A program
of the forward has all rows of a few columns of a sequence, so nothing is added up across programs: no atomics. The sums are
those of sentence-transformers' Pooling on the padded batch (Reimers and Gurevych, arXiv:1908.10084).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core.autograd import needs_backward
from .core.checks import check_device, check_dtype
from .core.configs import LENGTHS, Config
from .core.device_math import block_rows, place_of_tile, tile_offsets
from .core.failures import or_plain
from .core.launch import accumulator, accumulator_torch, cdiv, choose, fills, launch
from .core.op import define_op

__all__ = ["pool_rows"]

MODES = ("mean", "sqrt", "weighted", "max")


@triton.jit
def counted_rows(mask_ptr, positions, sequences, inside, seqlen, mask_batch_stride, mask_col_stride):
    """Which of the rows inside count: those where the mask is true at their position of the padded batch."""
    if mask_ptr is not None:
        columns = (positions - sequences * seqlen).to(tl.int64)
        places = sequences.to(tl.int64) * mask_batch_stride + columns * mask_col_stride
        inside = inside & (tl.load(mask_ptr + places, inside, other=0) != 0)
    return inside


@triton.jit
def larger(x, best, winner):
    """Whether x takes the place of `best`, the largest so far: NaN is largest, and the first of equals stays."""
    return (winner < 0) | (x > best) | ((x != x) & (best == best))


@triton.jit
def largest(best, winner):
    """(value, row) of the largest of each column, the first of equals; (-inf, -1) where no row counts."""
    nan = best != best
    has_nan = tl.max(nan.to(tl.int32), axis=0) != 0
    top = tl.max(tl.where(nan, float("-inf"), best), axis=0)
    equal = tl.where(has_nan[None, :], nan, best == top[None, :]) & (winner >= 0)
    NONE: tl.constexpr = 2147483647
    row = tl.min(tl.where(equal, winner, NONE), axis=0)
    return tl.where(has_nan, float("nan"), top), tl.where(row == NONE, -1, row)


@triton.jit(do_not_specialize=["seqlen"])
def pool_rows_fwd_kernel(
    x_ptr, cu_seqlens_ptr, index_ptr, mask_ptr, y_ptr, kept_ptr,
    x_row_stride, x_col_stride, mask_batch_stride, mask_col_stride, seqlen,
    N_COLS: tl.constexpr, MODE: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    col_mask = cols < N_COLS
    start, end = tl.load(cu_seqlens_ptr + sequence).to(tl.int64), tl.load(cu_seqlens_ptr + sequence + 1)
    first = start
    if index_ptr is not None:
        first = tl.load(index_ptr + start, start < end, other=0)

    tile = tl.zeros([BLOCK_M, BLOCK_N], ACC)  # sums, or the largest so far
    winner = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    weights = tl.zeros([BLOCK_M], ACC)
    for block in range(0, tl.cdiv(end - start, BLOCK_M)):
        rows = start + block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < end
        positions = rows
        if index_ptr is not None:
            positions = tl.load(index_ptr + rows, inside, other=0)
        counted = counted_rows(mask_ptr, positions, sequence, inside, seqlen, mask_batch_stride, mask_col_stride)

        mask = counted[:, None] & col_mask[None, :]
        x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)

        if MODE == "max":
            better = mask & larger(x, tile, winner)
            tile = tl.where(better, x, tile)
            winner = tl.where(better, rows.to(tl.int32)[:, None], winner)
        elif MODE == "weighted":
            weight = tl.where(counted, positions - first + 1, 0).to(ACC)
            tile += x * weight[:, None]
            weights += weight
        else:
            tile += x
            weights += counted.to(ACC)

    out = sequence.to(tl.int64) * N_COLS + cols
    if MODE == "max":
        y, row = largest(tl.where(winner < 0, float("-inf"), tile), winner)
        if kept_ptr is not None:
            tl.store(kept_ptr + out, row, col_mask)
    else:
        total = tl.sum(weights, axis=0)
        divisor = tl.sqrt(total) if MODE == "sqrt" else total
        divisor = tl.where(total > 0, divisor, 1.0)  # no row: 0 / 1
        y = tl.sum(tile, axis=0) / divisor
        if kept_ptr is not None:
            tl.store(kept_ptr + sequence, tl.where(total > 0, 1.0 / divisor, 0.0))  # the same from each program
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), col_mask)


@triton.jit(do_not_specialize=["n_rows", "n_sequences", "seqlen"])
def pool_rows_bwd_kernel(
    dy_ptr, cu_seqlens_ptr, index_ptr, mask_ptr, kept_ptr, dx_ptr,
    dy_row_stride, dy_col_stride, mask_batch_stride, mask_col_stride, n_rows, n_sequences, seqlen,
    N_COLS: tl.constexpr, MODE: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    rows = block_rows(block, BLOCK_M)
    row_mask, col_mask = rows < n_rows, cols < N_COLS

    positions = rows.to(tl.int32)
    if index_ptr is not None:
        positions = tl.load(index_ptr + rows, row_mask, other=-1)
    sequences = positions // seqlen
    inside = row_mask & (positions >= 0) & (sequences < n_sequences)
    counted = counted_rows(mask_ptr, positions, sequences, inside, seqlen, mask_batch_stride, mask_col_stride)

    mask = counted[:, None] & col_mask[None, :]
    dy = tl.load(dy_ptr + tile_offsets(sequences, cols, dy_row_stride, dy_col_stride), mask, other=0.0).to(ACC)
    if MODE == "max":
        winner = tl.load(kept_ptr + tile_offsets(sequences, cols, N_COLS, 1), mask, other=-1)
        dx = tl.where(winner == rows.to(tl.int32)[:, None], dy, 0.0)
    else:
        scale = tl.load(kept_ptr + sequences, counted, other=0.0)
        if MODE == "weighted":
            firsts = tl.load(cu_seqlens_ptr + sequences, counted, other=0)
            if index_ptr is not None:
                firsts = tl.load(index_ptr + firsts, counted, other=0)
            scale *= (positions - firsts + 1).to(ACC)
        dx = dy * scale[:, None]

    here = row_mask[:, None] & col_mask[None, :]
    tl.store(dx_ptr + tile_offsets(rows, cols, N_COLS, 1), dx.to(dx_ptr.dtype.element_ty), here)


class Inputs(NamedTuple):
    x: Tensor
    cu_seqlens: Tensor
    index: Tensor | None
    mask: Tensor | None
    mode: str
    n_sequences: int
    seqlen: int
    save: bool


class Saved(NamedTuple):
    """kept: the scales or the winning rows. What a mode does not read is None."""

    kept: Tensor
    cu_seqlens: Tensor | None
    index: Tensor | None
    mask: Tensor | None
    mode: str
    n_rows: int
    seqlen: int


def _plain_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, cu_seqlens, index, mask, mode, n_sequences, seqlen, save = inputs
    _, kept = _allocate_forward(inputs)
    padded = reference.padded_rows(x, cu_seqlens, n_sequences, seqlen, index, mask)
    if mode == "max":
        y, row = reference.largest_rows(padded)
        return y, row.to(kept.dtype).contiguous() if save else kept
    y, scale = reference.averaged_rows(padded, mode)
    return y.contiguous(), scale.to(kept.dtype) if save else kept


@or_plain(_plain_forward)
def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y [B, H], and what the backward reads of the rows: the scales or the winning rows."""
    x, cu_seqlens, index, mask, mode, n_sequences, seqlen, save = inputs
    y, kept = _allocate_forward(inputs)
    n_cols = x.shape[1]
    config = _configuration(inputs)
    launch(
        pool_rows_fwd_kernel,
        n_sequences * cdiv(n_cols, config.BLOCK_N),
        config,
        x,
        x_ptr=x,
        cu_seqlens_ptr=cu_seqlens,
        index_ptr=index if mask is not None or mode == "weighted" else None,  # otherwise every row counts alike
        mask_ptr=mask,
        y_ptr=y,
        kept_ptr=kept if save else None,
        x_row_stride=x.stride(0),
        x_col_stride=x.stride(1),
        mask_batch_stride=0 if mask is None else mask.stride(0),
        mask_col_stride=0 if mask is None else mask.stride(1),
        seqlen=seqlen,
        N_COLS=n_cols,
        MODE=mode,
        ACC=accumulator(x.dtype),
        VECTOR=16 // x.element_size(),
        BLOCK_M=config.BLOCK_M // 2 if mode == "max" else config.BLOCK_M,  # max has two numbers in registers per element
        BLOCK_N=config.BLOCK_N,
    )
    return y, kept


def _configuration(inputs: Inputs) -> Config:
    """Long sequences get a program per few columns; with few of them, per even fewer, so that more SMs read."""
    x, n_cols = inputs.x, inputs.x.shape[1]
    config = choose("pool_rows_forward", x, n_cols, inputs.seqlen)
    if inputs.seqlen <= LENGTHS[-1] or fills(inputs.n_sequences * cdiv(n_cols, config.BLOCK_N), x):
        return config
    return choose("pool_rows_forward_few", x, n_cols)


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, shape = inputs.x, (inputs.n_sequences, inputs.x.shape[1])
    dtype = torch.int32 if inputs.mode == "max" else accumulator_torch(x.dtype)
    kept = shape if inputs.mode == "max" else shape[:1]
    return x.new_empty(shape), x.new_empty(kept if inputs.save else (0,), dtype=dtype)


def _plain_backward(dy: Tensor, saved: Saved) -> Tensor:
    kept, cu_seqlens, index, mask, mode, n_rows, seqlen = saved
    rows = torch.arange(n_rows, device=dy.device)
    positions = rows if index is None else index.long()
    sequences = positions // max(seqlen, 1)
    counted = (positions >= 0) & (sequences < dy.shape[0])
    dx = dy.new_zeros((n_rows, dy.shape[1]))
    rows, positions, sequences = rows[counted], positions[counted], sequences[counted]
    gradients = dy[sequences]
    if mode == "max":
        dx[rows] = torch.where(kept[sequences] == rows[:, None], gradients, 0.0)
        return dx
    scale = kept[sequences]
    if mode == "weighted":
        firsts = cu_seqlens[sequences].long()
        scale = scale * (positions - (firsts if index is None else index[firsts]) + 1)
    if mask is not None:
        scale = torch.where(mask[sequences, positions - sequences * seqlen], scale, 0.0)
    dx[rows] = (gradients * scale[:, None]).to(dx.dtype)
    return dx


@or_plain(_plain_backward)
def launch_backward(dy: Tensor, saved: Saved) -> Tensor:
    """The gradient of x."""
    kept, cu_seqlens, index, mask, mode, n_rows, seqlen = saved
    dx = _allocate_backward(dy, saved)
    n_sequences, n_cols = dy.shape
    config = choose("pool_rows_backward", dy, n_cols)
    launch(
        pool_rows_bwd_kernel,
        cdiv(n_rows, config.BLOCK_M) * cdiv(n_cols, config.BLOCK_N),
        config,
        dy,
        dy_ptr=dy,
        cu_seqlens_ptr=cu_seqlens,
        index_ptr=index,
        mask_ptr=mask,
        kept_ptr=kept,
        dx_ptr=dx,
        dy_row_stride=dy.stride(0),
        dy_col_stride=dy.stride(1),
        mask_batch_stride=0 if mask is None else mask.stride(0),
        mask_col_stride=0 if mask is None else mask.stride(1),
        n_rows=n_rows,
        n_sequences=n_sequences,
        seqlen=max(seqlen, 1),
        N_COLS=n_cols,
        MODE=mode,
        ACC=accumulator(dy.dtype),
        VECTOR=16 // dy.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return dx


def _allocate_backward(dy: Tensor, saved: Saved) -> Tensor:
    return dy.new_empty((saved.n_rows, dy.shape[1]))


def _save(inputs: Inputs, y: Tensor, kept: Tensor) -> Saved:
    x, cu_seqlens, index, mask, mode, _, seqlen, _ = inputs
    bounds = cu_seqlens if mode == "weighted" else None
    return Saved(kept, bounds, index, None if mode == "max" else mask, mode, x.shape[0], seqlen)


def _gradients(backward, dy: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    return {"x": backward(dy, saved)}


_call = define_op("pool_rows", (launch_forward, _allocate_forward), (launch_backward, _allocate_backward), _save, _gradients)


def pool_rows(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    *,
    n_sequences: int,
    seqlen: int,
    index: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One row per sequence: the mean, a weighted mean or the largest of its token rows, without unpacking them.

    Args:
        x: [T, H], T below 2**31. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        cu_seqlens: int32 [at least n_sequences + 1]. Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Later sequences
            are spare capacity, which nothing reads and which gets no gradient.
        mode: "mean" (sum / count), "sqrt" (sum / sqrt(count)), "weighted" (a mean whose weights are the positions, counted
            from 1 at the first row of the sequence, counted or not) or "max" (NaN is larger than any number; the gradient
            goes to the first of equals).
        n_sequences: B.
        seqlen: S.
        index: int32 [T], b * S + s for the row of position s of sequence b, increasing within a sequence, -1 for spare
            capacity; None if x has every position of the batch, T = B S.
        mask: bool [B, S], any strides: only rows at whose position it is true count; None: all rows.

    Returns:
        [B, H], contiguous, the dtype of x, summed in float32. Where no row counts, 0, or -inf for "max".

    Raises:
        ValueError: a mode, a dtype, a shape or a device that is not as above.
    """
    _check(x, cu_seqlens, mode, n_sequences, seqlen, index, mask)
    save = needs_backward(x)
    call = _call if save or torch.compiler.is_compiling() else launch_forward
    index = None if index is None else index.contiguous()
    return call(Inputs(x, cu_seqlens.contiguous(), index, mask, mode, n_sequences, seqlen, save))[0]


def _check(
    x: Tensor, cu_seqlens: Tensor, mode: str, n_sequences: int, seqlen: int, index: Tensor | None, mask: Tensor | None
) -> None:
    check_dtype("x", x)
    if x.dim() != 2 or x.shape[0] >= 2**31:
        raise ValueError(f"x: expected [T, H] with T < 2**31, got {tuple(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] <= n_sequences:
        expected = f"int32 [at least {n_sequences + 1}]"
        raise ValueError(f"cu_seqlens: expected {expected}, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if index is None:
        if x.shape[0] != n_sequences * seqlen:
            raise ValueError(f"x: expected {n_sequences} * {seqlen} rows without an index, got {x.shape[0]}")
    elif index.dtype != torch.int32 or index.shape != x.shape[:1]:
        raise ValueError(f"index: expected int32 [{x.shape[0]}], got {index.dtype} {tuple(index.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (n_sequences, seqlen)):
        raise ValueError(f"mask: expected bool {(n_sequences, seqlen)}, got {mask.dtype} {tuple(mask.shape)}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("index", index), ("mask", mask)):
        check_device(name, tensor, x)
