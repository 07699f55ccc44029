"""Chunks of rows whose logits linear_cross_entropy has in memory together: their length, their loop and their gradients' sums.

The length follows from bytes, of shapes and dtypes alone, never from the free memory: reading that would wait for the device,
and sums over other chunks have other bits. A chunk has up to twice the bytes of the sums that chunks add to, as long as
everything together stays under a fifth of eager's three tensors of logits; it has at least MIN_ROWS rows.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..core.launch import accumulator_torch, cdiv
from .rows import ROW, Targets, launch_rows, pad_bias, padded

__all__: list[str] = []

MIN_ROWS = 1024  # per chunk: cuBLAS is slower with fewer
MIN_CUT = 8192  # classes from which on a second product costs less than loads of a few bytes


def max_kept_rows(n_cols: int, width: int, dtype: torch.dtype) -> int:
    """Up to how many rows all logits are kept and nothing is summed: MIN_ROWS, or while they take at most twice the bytes of
    the sums. With so few rows dW and its sum alone are nearly a quarter of eager's memory."""
    row, of_dhidden, of_dweight = _bytes(n_cols, width, dtype)
    return max(MIN_ROWS, 2 * of_dweight // (row - 2 * of_dhidden)) if row > 2 * of_dhidden else 2**62


def rows_per_chunk(n_rows: int, n_cols: int, width: int, dtype: torch.dtype) -> int:
    """How many rows have their logits in memory together.

    Speed favours long chunks: each takes five launches, and each but the first reads and writes the sum dW. With twice the
    bytes of dW's and dh's sums, a chunk's own passes over its logits move five times as much. Memory favours short ones: eager
    keeps three tensors of all logits, and this op should hold a fifth of them (a quarter including torch's column sum and the
    allocator's rounding), unless chunks were then shorter than MIN_ROWS.
    """
    if n_rows <= max_kept_rows(n_cols, width, dtype):
        return n_rows
    row, of_dhidden, of_dweight = _bytes(n_cols, width, dtype)
    summed, eager = n_rows * of_dhidden + of_dweight, 3 * n_rows * row
    chunks = cdiv(n_rows, max(min(2 * summed, eager // 5 - summed) // row, MIN_ROWS))
    return cdiv(cdiv(n_rows, chunks), 64) * 64  # even lengths: the last chunk is not much shorter


def _bytes(n_cols: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of a row of logits, of a row of dh, and of the sum dW."""
    return padded(n_cols) * dtype.itemsize, width * dtype.itemsize, n_cols * width * accumulator_torch(dtype).itemsize


def chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    *,
    losses: Tensor | None = None,
    dlosses: Tensor | None = None,
    gradient: bool = False,
    scale: float = 1.0,
    buffer: Tensor | None = None,
) -> Iterator[Tensor]:
    """For each chunk, what its kernel left in the buffer. With `buffer` all rows are one chunk."""
    n_rows, n_cols = hidden.shape[0], weight.shape[0]
    if not n_rows:
        return
    size = n_rows if buffer is not None else chunk_size(hidden, weight)
    if buffer is None:
        buffer = torch.empty((size, padded(n_cols)), dtype=weight.dtype, device=weight.device)
    bias, transposed = pad_bias(bias), weight.t()
    logits = buffer if buffer.shape[1] == n_cols else buffer[:, :n_cols]
    losses_of, dlosses_of = (None if x is None else x.split(size) for x in (losses, dlosses))
    for i, (rows, compared) in enumerate(zip(hidden.split(size), targets.split(size), strict=True)):
        if len(rows) < len(logits):  # the last chunk
            logits = logits[: len(rows)]
        for cut in cuts(weight):
            torch.mm(rows, transposed[:, cut], out=logits[:, cut])
        launch_rows(
            logits,
            bias,
            compared,
            None if losses_of is None else losses_of[i],
            None if dlosses_of is None else dlosses_of[i],
            gradient,
            scale,
        )
        yield logits


def chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk; the last chunk may have fewer."""
    n_rows = hidden.shape[0]
    return max(min(rows_per_chunk(n_rows, *weight.shape, weight.dtype), n_rows), 1)


class Gradients:
    """dhidden, dweight and dbias of chunks of `size` rows, summed and divided by `scale`; empty where not needed."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs: Sequence[bool], sums: torch.dtype, scale: float, size: int
    ) -> None:
        self.weight, self.needs, self.alpha = weight, needs, 1.0 / scale
        new = hidden.new_empty if hidden.shape[0] else hidden.new_zeros
        self.dhidden = new(hidden.shape if needs[0] else 0)
        self.dweight = new(weight.shape if needs[1] else 0, dtype=sums)
        self._hidden = hidden.split(size) if hidden.shape[0] else ()
        self._dhidden = self.dhidden.split(size)
        # One row per chunk; they are added up at the end, in one launch.
        rows = len(self._hidden) if needs[2] else 0
        self._dbias = hidden.new_empty(rows, weight.shape[0], dtype=accumulator_torch(weight.dtype))
        self._done = 0

    def add(self, dlogits: Tensor) -> None:
        """Add the gradients of the next chunk."""
        if self.needs[0]:
            add_dhidden(self._dhidden[self._done], dlogits, self.weight, self.alpha)
        if self.needs[1]:
            add_dweight(self.dweight, self.weight, dlogits, self._hidden[self._done], self.alpha, self._done == 0)
        if self.needs[2]:
            torch.sum(dlogits, 0, dtype=self._dbias.dtype, out=self._dbias[self._done])
        self._done += 1

    @property
    def dbias(self) -> Tensor:
        if not self.needs[2]:
            return self._dbias.view(-1)
        total = self._dbias[0] if len(self._dbias) == 1 else self._dbias.sum(0)
        return unscaled(total, self.alpha)


def unscaled(sums: Tensor, alpha: float) -> Tensor:
    """sums * alpha, in place."""
    return sums if alpha == 1.0 else sums.mul_(alpha)


def cuts(weight: Tensor) -> tuple[slice, ...]:
    """The columns of logits as the products take them, one product per slice.

    Where 16 bytes do not divide a row of logits, as with 30,522 classes, cuBLAS falls to kernels that load a few bytes at a
    time. So the columns behind the last multiple of ROW are a small product of their own. In bf16 with 3,328 rows of 768 on an
    H200 the three products then take 230, 211 and 222 us instead of 634, 649 and 340.
    """
    n_cols = weight.shape[0]
    if n_cols < MIN_CUT or n_cols * weight.element_size() % 16 == 0:
        return (slice(None),)
    whole = n_cols // ROW * ROW
    return slice(whole, None), slice(whole)  # the small one first: in dh it is rounded again when the other is added


def add_dhidden(dhidden: Tensor, dlogits: Tensor, weight: Tensor, alpha: float) -> None:
    """dhidden = alpha dlogits weight."""
    for i, cut in enumerate(cuts(weight)):
        accumulate(dhidden, dlogits[:, cut], weight[cut], alpha, i == 0)


def add_dweight(dweight: Tensor, weight: Tensor, dlogits: Tensor, hidden: Tensor, alpha: float, first: bool) -> None:
    """dweight (+)= alpha dlogits' hidden, the gradient of weight."""
    for cut in cuts(weight):
        accumulate(dweight[cut], dlogits[:, cut].t(), hidden, alpha, first)


def accumulate(total: Tensor, a: Tensor, b: Tensor, alpha: float, first: bool) -> None:
    """total (+)= alpha a b, in the type of total, which is wider than that of 16-bit a and b where rows come in chunks."""
    beta = 0 if first else 1  # with 0, total is not read
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)
    else:  # the CPU has no product with another output dtype
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha, out=total)
