"""What linear_cross_entropy computes on rows of logits [rows, V] between its matrix products.

A row's target is t = onehot(label); its loss and gradient are those of x = logits + bias, 0 if the label is ignored:

    losses      sum_c t_c (logsumexp(x) - x_c)
    dlogits     softmax(x) sum_c t_c - t, in place of the logits

With label smoothing e (Szegedy et al., arXiv:1512.00567) t is (1 - e) onehot(label) + e / V, and class weights multiply it
elementwise, so an unsmoothed row reads one weight, its label's. One pass over a row finds its maximum and its sum (Milakov and
Gimelshein, arXiv:1805.02867), a second one writes the gradient and finds the row in the cache.

The buffer's row stride is a multiple of 128 bytes, because no vector length divides V (30522).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..core.device_math import block_rows, chunked_columns, offsets, place_of_tile, tile_offsets
from ..core.failures import or_plain
from ..core.launch import accumulator, accumulator_torch, as_rows, cdiv, choose, launch
from . import plain

__all__: list[str] = []

ROW = 64  # the buffer's row stride is a multiple of so many elements

# float16 has no numbers between 0 and 6e-8, and most of 30522 probabilities are at most a few times that: dlogits are stored
# multiplied by this factor, and the products divide by it. It is no larger, because cuBLAS's sums end at 65504.
FLOAT16_SCALE = 16.0


@triton.jit
def _exp(x):
    # exp2 is one instruction in float32 and exp is five; exp2 also gets denormals right.
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)


@triton.jit
def _load_logits(
    logits_ptr, bias_ptr, rows, cols, row_mask, N_COLS: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, END: tl.constexpr
):
    """Logits plus bias. END: columns may lie past the last, where the result is -inf. The loads' mask is that of STRIDE, which
    vectors divide."""
    mask = row_mask & (cols < STRIDE) if END else row_mask
    x = tl.load(logits_ptr + offsets(rows, cols, STRIDE, 1), mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, cols < STRIDE if END else None, eviction_policy="evict_last").to(ACC)
    return tl.where(cols < N_COLS, x, float("-inf")) if END else x


@triton.jit
def _load_weights(class_weights_ptr, cols, STRIDE: tl.constexpr, END: tl.constexpr):
    """Class weights, shared by all rows; 0 past the last class."""
    return tl.load(
        class_weights_ptr + cols, cols < STRIDE if END else None, other=0.0 if END else None, eviction_policy="evict_last"
    )


@triton.jit
def _joined(x, top, total):
    """Merge a tile [chunks, rows, lanes] into the lanes' online softmax [rows, lanes]."""
    higher = tl.maximum(top, tl.max(x, axis=0))
    return higher, total * _exp(top - higher) + tl.sum(_exp(x - higher[None, :, :]), axis=0)


@triton.jit
def _added(x, sum_x, sum_weights, class_weights_ptr, cols, STRIDE: tl.constexpr, END: tl.constexpr):
    """For smoothing: add a tile's logits to the lanes' sums; with class weights, their products with the weights, and the
    weights."""
    if class_weights_ptr is not None:
        weights = _load_weights(class_weights_ptr, cols, STRIDE, END)
        sum_weights += tl.sum(weights, axis=0)
        x *= weights
    return sum_x + tl.sum(x, axis=0), sum_weights


@triton.jit
def _spread(class_weights_ptr, cols, spread, SMOOTHING: tl.constexpr, STRIDE: tl.constexpr, END: tl.constexpr):
    """Each class's share of the smoothing: uniform, or multiplied by its weight."""
    if SMOOTHING > 0 and class_weights_ptr is not None:
        spread *= _load_weights(class_weights_ptr, cols, STRIDE, END)
    return spread


@triton.jit
def _dlogits(x, cols, label_cols, row_top, factor, at_label, spread, counted, SMOOTHING: tl.constexpr):
    """softmax(x) - target, where softmax(x) is exp(x - row_top) * factor; the target is `spread`, plus `at_label` at the
    label."""
    dx = _exp(x - row_top) * factor
    if SMOOTHING > 0:
        dx -= spread
    dx = tl.where(cols == label_cols, dx - at_label, dx)
    return tl.where(counted, dx, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def linear_cross_entropy_fwd_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    class_weights_ptr,
    dlosses_ptr,
    losses_ptr,
    dlogits_ptr,
    dlosses_stride,
    n_rows,
    N_COLS: tl.constexpr,
    STRIDE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    LOWEST: tl.constexpr = -3.4028234663852886e38 if tl.float32 == ACC else -1.7976931348623157e308
    TILE: tl.constexpr = CHUNKS * BLOCK_N
    END: tl.constexpr = N_COLS // TILE * TILE  # up to here tiles are whole
    tile_cols = chunked_columns(CHUNKS, BLOCK_N, VECTOR)
    rows = block_rows(tl.program_id(0), BLOCK_M)
    row_mask = rows < n_rows
    tile_rows, tile_row_mask = rows[None, :, None], row_mask[None, :, None]
    labels = tl.load(labels_ptr + rows, row_mask, other=IGNORE_INDEX)
    counted = labels != IGNORE_INDEX
    known = counted & (labels >= 0) & (labels < N_COLS)  # the launcher raises for any other label
    # Loaded before the sums over a row, whose barrier keeps other warps from overwriting it with a gradient.
    label_pointers = logits_ptr + offsets(rows, labels, STRIDE, 1)
    label_logit = tl.load(label_pointers, known, other=0.0).to(ACC)
    if bias_ptr is not None:
        label_biases = bias_ptr + labels
        label_logit += tl.load(label_biases, known, other=0.0).to(ACC)

    # Each lane has a maximum and a sum of its own: merging takes no barrier, and one exponential per tile instead of per
    # element.
    top = tl.full([BLOCK_M, BLOCK_N], LOWEST, ACC)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    sum_x = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    sum_weights = tl.zeros([1, BLOCK_N], ACC)
    for start in range(0, END, TILE):
        x = _load_logits(logits_ptr, bias_ptr, tile_rows, start + tile_cols, tile_row_mask, N_COLS, STRIDE, ACC, False)
        top, total = _joined(x, top, total)
        if SMOOTHING > 0:
            sum_x, sum_weights = _added(x, sum_x, sum_weights, class_weights_ptr, start + tile_cols, STRIDE, False)
    if END < N_COLS:
        cols = END + tile_cols
        x = _load_logits(logits_ptr, bias_ptr, tile_rows, cols, tile_row_mask, N_COLS, STRIDE, ACC, True)
        top, total = _joined(x, top, total)
        if SMOOTHING > 0:
            x = tl.where(cols < N_COLS, x, 0.0)
            sum_x, sum_weights = _added(x, sum_x, sum_weights, class_weights_ptr, cols, STRIDE, True)
    row_top = tl.max(top, axis=1)
    row_total = tl.sum(total * _exp(top - row_top[:, None]), axis=1)
    if class_weights_ptr is not None:
        label_weight = tl.load(class_weights_ptr + labels, known, other=0.0)

    if losses_ptr is not None:
        loss = tl.log(row_total) + (row_top - label_logit)
        if class_weights_ptr is not None:
            if SMOOTHING > 0:
                all_losses = (tl.log(row_total) + row_top) * tl.sum(sum_weights, axis=1) - tl.sum(sum_x, axis=1)
                loss = (1.0 - SMOOTHING) * label_weight * loss + SMOOTHING / N_COLS * all_losses
            else:
                loss *= label_weight
        elif SMOOTHING > 0:
            loss += SMOOTHING * (label_logit - tl.sum(sum_x, axis=1) / N_COLS)
        tl.store(losses_ptr + rows, tl.where(counted, loss, 0.0).to(losses_ptr.dtype.element_ty), row_mask)

    if dlogits_ptr is not None:
        dloss = tl.full([BLOCK_M], SCALE, ACC)
        if dlosses_ptr is not None:
            dloss *= tl.load(dlosses_ptr + rows * dlosses_stride, row_mask, other=0.0).to(ACC)
        spread = dloss * (SMOOTHING / N_COLS)
        at_label = dloss * (1.0 - SMOOTHING)
        if class_weights_ptr is not None:
            at_label *= label_weight
            dloss = at_label
            if SMOOTHING > 0:
                dloss += spread * tl.sum(sum_weights, axis=1)
        factor = (dloss / row_total)[None, :, None]  # dloss: the target's sum times the upstream gradient
        spread, at_label = spread[None, :, None], at_label[None, :, None]
        row_top, counted = row_top[None, :, None], counted[None, :, None]
        label_cols = tl.where(known, labels, -1).to(tl.int32)[None, :, None]
        for start in range(0, END, TILE):
            cols = start + tile_cols
            x = _load_logits(logits_ptr, bias_ptr, tile_rows, cols, tile_row_mask, N_COLS, STRIDE, ACC, False)
            target = _spread(class_weights_ptr, cols, spread, SMOOTHING, STRIDE, False)
            dx = _dlogits(x, cols, label_cols, row_top, factor, at_label, target, counted, SMOOTHING)
            dx = dx.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + offsets(tile_rows, cols, STRIDE, 1), dx, tile_row_mask)
        if END < N_COLS:
            cols = END + tile_cols
            x = _load_logits(logits_ptr, bias_ptr, tile_rows, cols, tile_row_mask, N_COLS, STRIDE, ACC, True)
            target = _spread(class_weights_ptr, cols, spread, SMOOTHING, STRIDE, True)
            dx = _dlogits(x, cols, label_cols, row_top, factor, at_label, target, counted, SMOOTHING)
            dx = dx.to(dlogits_ptr.dtype.element_ty)
            tl.store(dlogits_ptr + offsets(tile_rows, cols, STRIDE, 1), dx, tile_row_mask & (cols < STRIDE))


@triton.jit(do_not_specialize=["n_rows"])
def linear_cross_entropy_reduce_kernel(
    losses_ptr,
    labels_ptr,
    class_weights_ptr,
    unit_ptr,
    loss_ptr,
    scale_ptr,
    in_range_ptr,
    n_rows,
    N_COLS: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: the sum or mean of the losses, its derivative with respect to a row's loss, and the check of the labels."""
    total = tl.zeros([BLOCK_M], ACC)
    counted = tl.zeros([BLOCK_M], tl.int32)
    strays = tl.zeros([BLOCK_M], tl.int32)
    weights = tl.zeros([BLOCK_M], ACC)
    for start in range(0, n_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M).to(tl.int64)
        labels = tl.load(labels_ptr + rows, rows < n_rows, other=IGNORE_INDEX)
        ours = labels != IGNORE_INDEX
        known = ours & (labels >= 0) & (labels < N_COLS)
        counted += ours.to(tl.int32)
        strays += (ours & ~known).to(tl.int32)
        if loss_ptr is not None:
            total += tl.load(losses_ptr + rows, rows < n_rows, other=0.0)
            if class_weights_ptr is not None and MEAN:
                weights += tl.load(class_weights_ptr + labels, known, other=0.0)

    tl.store(in_range_ptr, (tl.sum(strays, axis=0) == 0).to(tl.int32))
    if loss_ptr is not None:
        loss = tl.sum(total, axis=0)
        n = tl.sum(counted, axis=0)
        scale = tl.full([], 1.0, ACC)
        if MEAN:
            if class_weights_ptr is None:
                of = n.to(ACC)
            else:  # if all rows that count weigh nothing, loss and gradients are NaN, as in torch
                of = tl.sum(weights, axis=0)
                of = tl.where(of == 0.0, float("nan"), of)
            loss = loss / of  # NaN where no label counts, as in torch; the gradient is then 0, also as in torch
            scale = tl.where(n == 0, 1.0, 1.0 / of)
        elif unit_ptr is not None:
            scale = tl.load(unit_ptr)
            loss *= scale
        tl.store(scale_ptr, scale)
        tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["n_rows"])
def linear_cross_entropy_bwd_scale_kernel(
    x_ptr, dloss_ptr, scale_ptr, y_ptr, x_row_stride, x_col_stride, n_rows,
    N_COLS: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x * dloss * scale; dloss and scale are on the device."""
    block, cols = place_of_tile(tl.program_id(0), N_COLS, BLOCK_N, VECTOR)
    rows = block_rows(block, BLOCK_M)
    mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]

    factor = tl.load(dloss_ptr).to(ACC) * tl.load(scale_ptr).to(ACC)
    x = tl.load(x_ptr + tile_offsets(rows, cols, x_row_stride, x_col_stride), mask, other=0.0).to(ACC)
    tl.store(y_ptr + tile_offsets(rows, cols, N_COLS, 1), (x * factor).to(y_ptr.dtype.element_ty), mask)


class Targets(NamedTuple):
    """What rows of logits are compared with.

    labels: contiguous [rows].
    class_weights: None (all are 1), or contiguous in the kernels' accumulation type; with smoothing padded with zeros to the
        buffer's row stride.
    unit: what the class weights were divided by, on the device; None for 1.
    """

    labels: Tensor
    class_weights: Tensor | None
    unit: Tensor | None
    ignore_index: int
    label_smoothing: float

    def split(self, size: int) -> Iterator["Targets"]:
        """The targets of chunks of `size` rows."""
        return (self._replace(labels=labels) for labels in self.labels.split(size))


def targets_of(
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
    kept: bool = False,
) -> Targets:
    """The targets for logits of `dtype`. With `kept`, gradients are stored in `dtype` before the loss's gradient multiplies
    them."""
    unit = None
    if class_weights is not None:
        class_weights = class_weights.to(accumulator_torch(dtype))
        if kept and gradient_scale(dtype) != 1.0 and labels.numel():
            unit = _unit(class_weights, labels, ignore_index)
            class_weights = class_weights / unit
        more = padded(len(class_weights)) - len(class_weights) if label_smoothing else 0
        class_weights = F.pad(class_weights, (0, more)) if more else class_weights.contiguous()
    return Targets(labels, class_weights, unit, ignore_index, label_smoothing)


def _unit(class_weights: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """The largest weight of a label that occurs. Dividing by it brings weights of any size to about 1, which float16 needs.

    Classes whose label does not occur are left out: rare classes may weigh 1e8, or infinity.
    """
    found = class_weights[labels.clamp(0, len(class_weights) - 1)].abs()
    found = found.masked_fill(labels == ignore_index, 0.0).nan_to_num(0.0, 0.0, 0.0)
    largest = found.amax()
    return torch.where(largest > 0, largest, 1.0)


def padded(n_cols: int) -> int:
    """The row stride of logits, in elements."""
    return cdiv(n_cols, ROW) * ROW


def gradient_scale(dtype: torch.dtype) -> float:
    """The factor by which dlogits are stored too large."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def pad_bias(bias: Tensor | None) -> Tensor | None:
    """The bias padded to the buffer's row stride, so that it too is loaded 16 bytes at a time; the padding is not used."""
    if bias is None:
        return None
    found = torch.empty(padded(bias.shape[0]), dtype=bias.dtype, device=bias.device)
    found[: bias.shape[0]].copy_(bias)
    return found


@or_plain(plain.launch_rows)
def launch_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: Targets,
    losses: Tensor | None,
    dlosses: Tensor | None,
    gradient: bool,
    scale: float = 1.0,
) -> None:
    """Compute the losses of rows of logits and, in place, their gradients. The logits are `padded` rows, as is the bias.

    losses: contiguous [rows], or None to compute none. dlosses: the rows' upstream gradients, or None.
    """
    n_rows, n_cols = logits.shape
    assert logits.stride(1) == 1 and (n_rows < 2 or logits.stride(0) == padded(n_cols))
    config = choose("linear_cross_entropy", logits, n_cols)
    assert config.BLOCK_N is not None and config.chunk is not None
    chunks = config.BLOCK_N // config.chunk
    if targets.class_weights is not None and targets.label_smoothing and chunks > 1:
        chunks //= 2  # the class weights of a tile take as many registers as its logits
    launch(
        linear_cross_entropy_fwd_kernel,
        cdiv(n_rows, config.BLOCK_M),
        config,
        logits,
        logits_ptr=logits,
        bias_ptr=bias,
        labels_ptr=targets.labels,
        class_weights_ptr=targets.class_weights,
        dlosses_ptr=dlosses,
        losses_ptr=losses,
        dlogits_ptr=logits if gradient else None,
        dlosses_stride=0 if dlosses is None else dlosses.stride(0),
        n_rows=n_rows,
        N_COLS=n_cols,
        STRIDE=padded(n_cols),
        IGNORE_INDEX=targets.ignore_index,
        SMOOTHING=targets.label_smoothing,
        SCALE=scale,
        ACC=accumulator(logits.dtype),
        VECTOR=16 // logits.element_size(),
        BLOCK_M=config.BLOCK_M,
        CHUNKS=chunks,
        BLOCK_N=config.chunk,
    )


@or_plain(plain.launch_reduce)
def launch_reduce(
    losses: Tensor, targets: Targets, n_cols: int, reduction: str, loss: Tensor | None, scale: Tensor | None
) -> None:
    """Write the sum or mean of the losses to `loss` and its derivative with respect to a row's loss to `scale`; check the
    labels.

    On a GPU a label that is no class fails an assertion on the device, as in torch, without a synchronisation.
    """
    config = choose("linear_cross_entropy_reduce", losses, 1)
    labels, ignore_index = targets.labels, targets.ignore_index
    in_range = torch.empty((), dtype=torch.int32, device=labels.device)
    launch(
        linear_cross_entropy_reduce_kernel,
        1,
        config,
        losses,
        losses_ptr=losses,
        labels_ptr=labels,
        class_weights_ptr=targets.class_weights,
        unit_ptr=targets.unit,
        loss_ptr=loss,
        scale_ptr=scale,
        in_range_ptr=in_range,
        n_rows=labels.shape[0],
        N_COLS=n_cols,
        IGNORE_INDEX=ignore_index,
        MEAN=reduction == "mean",
        ACC=accumulator(losses.dtype),
        BLOCK_M=config.BLOCK_M,
    )
    if labels.is_cuda:
        torch._assert_async(in_range, f"linear_cross_entropy: a label is neither {ignore_index} nor in [0, {n_cols})")


@or_plain(plain.scaled)
def scaled(x: Tensor, dloss: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """x * dloss * scale as a contiguous tensor of `dtype`; dloss and scale are single numbers on the device.

    in_place: write over x, which must be contiguous and of that dtype.
    """
    assert not in_place or (x.is_contiguous() and x.dtype == dtype)
    y = x if in_place else torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = as_rows(x)
    n_rows, n_cols = rows.shape
    widest = y if y.element_size() > x.element_size() else x
    config = choose("linear_cross_entropy_scale", widest, n_cols)
    assert config.BLOCK_N is not None
    launch(
        linear_cross_entropy_bwd_scale_kernel,
        cdiv(n_rows, config.BLOCK_M) * cdiv(n_cols, config.BLOCK_N),
        config,
        x,
        x_ptr=rows,
        dloss_ptr=dloss,
        scale_ptr=scale,
        y_ptr=y,
        x_row_stride=rows.stride(0),
        x_col_stride=rows.stride(1),
        n_rows=n_rows,
        N_COLS=n_cols,
        ACC=accumulator(x.dtype),
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return y


def check_on_cpu(labels: Tensor, n_cols: int, ignore_index: int) -> None:
    """Raise torch's own IndexError for a label that is no class; on a CPU reading the labels costs nothing."""
    strays = labels[(labels != ignore_index) & ((labels < 0) | (labels >= n_cols))]
    if strays.numel():
        raise IndexError(f"Target {int(strays[0])} is out of bounds.")
