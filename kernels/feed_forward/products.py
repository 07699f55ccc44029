"""The two products of the feed-forward around its activation, with the activation in their epilogue.

x [T, H], weight [F, H], bias [F]; in the backward the output's weight [O, F]:

    product    h = x weight', y = activation(h + bias)             saves 2TF elements of traffic: h read again
    gradient   dh = (dout output_weight) * slope(h + bias), y      saves 3TF: dy written and read, h read again

The savings are over cuBLAS and bias_gelu, whose results these are: h and dy are rounded to the tensors' type before the
activation reads them. The bias gradient is one float32 sum per block of rows, added up in a second pass: no atomics. float32
products stay cuBLAS's.

configs.FUSED says for which (H, F) and from how many rows on a plan binds these kernels. The table is empty until a GPU run has
earned an entry. A kernel that does not compile is replaced by cuBLAS and bias_gelu in the same plan.

Programs take tiles in an order in which neighbours share rows and columns of the operands in the L2 cache (the grouped order of
Triton's tutorial 03; `programs_per_multiprocessor` selects the persistent form of tutorial 09, with a fixed number of
programs). The epilogue works on quarters of the tile's columns, so that two programs of 128 registers per thread fit an SM and
the epilogue of one overlaps the product of the other. Operands are loaded through pointers (cp.async): a descriptor for the
tensor memory accelerator is encoded on the host per launch or needs scratch memory on the device, and saves a tenth of the
loop's instructions (bench/FINDINGS.md).

`inner_stride` is H, both the stride of x and weight and the length of the sums. It is an argument so that Triton can specialise
it by divisibility.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import triton
import triton.language as tl
from torch import Tensor

from ..core import failures
from ..core.configs import FUSED, TABLES, Config
from ..core.device_math import activation as activate
from ..core.device_math import activation_backward
from ..core.launch import Work, accumulator, cdiv, choose, resident_programs, table_of

PRODUCT, GRADIENT = "feed_forward_product", "feed_forward_gradient"  # names of their tables in configs.py
KERNELS = ("feed_forward_fwd_kernel", "feed_forward_bwd_kernel")
ACTIVATIONS = ("gelu", "relu")  # the slopes of the others need more registers than a product leaves
_decided: tuple[bool, bool] | None = None


@triton.jit
def _place(tile, n_rows, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row (int64) and first column of a tile: groups of eight blocks of rows, column by column within a group."""
    GROUP: tl.constexpr = 8
    n_col_blocks: tl.constexpr = N_COLS // BLOCK_N
    first = (tile // (GROUP * n_col_blocks)) * GROUP
    height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - first, GROUP)
    inside = tile % (GROUP * n_col_blocks)
    return (first + inside % height).to(tl.int64) * BLOCK_M, (inside // height) * BLOCK_N


@triton.jit
def _tiles(n_rows, N_COLS: tl.constexpr, PERSISTENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's first tile and the end of all tiles; the stride between its tiles is the number of programs."""
    first = tl.program_id(0)
    end = tl.cdiv(n_rows, BLOCK_M) * (N_COLS // BLOCK_N) if PERSISTENT else first + 1
    return first, end


@triton.jit
def _rows_of_tile(ptr, row, n_rows, inner_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_K] to the rows from `row` on, and the number of the last row that exists.

    Offsets inside a tile fit 32 bits. Rows past the last one point to the last: they are read but never written.
    """
    last = tl.minimum(n_rows - row, BLOCK_M).to(tl.int32) - 1
    rows = tl.minimum(tl.arange(0, BLOCK_M), last)
    return ptr + row * inner_stride + rows[:, None] * inner_stride + tl.arange(0, BLOCK_K)[None, :], last


@triton.jit
def _part_of_tile(row, col, last, N_COLS: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr):
    """For a tile's first quarter: the tile's offset in 64 bits, offsets [BLOCK_M, PART] inside the tile, and their mask."""
    rows = tl.arange(0, BLOCK_M)
    return row * N_COLS + col, rows[:, None] * N_COLS + tl.arange(0, PART)[None, :], (rows <= last)[:, None]


@triton.jit
def _multiplied(
    x, weight, weight_step, n_inner, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The product of x [BLOCK_M, BLOCK_K] and weight [BLOCK_K, BLOCK_N] behind the pointers, advanced along the inner
    dimension."""
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for _ in range(0, tl.cdiv(n_inner, BLOCK_K)):
        total = tl.dot(tl.load(x), tl.load(weight), total, input_precision="ieee", out_dtype=ACC)
        x += BLOCK_K
        weight += weight_step
    return total


@triton.jit
def _halves(x):
    """The left and right halves of x's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _quarters(x):
    """The columns of x in four parts, left to right."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit(do_not_specialize=["n_rows"])
def feed_forward_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, n_rows, inner_stride,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, PERSISTENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = y_ptr.dtype.element_ty
    EXACT: tl.constexpr = LOW.primitive_bitwidth > 16
    PART: tl.constexpr = BLOCK_N // 4
    cols, inner, part_cols = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, PART)
    first, end = _tiles(n_rows, N_COLS, PERSISTENT, BLOCK_M, BLOCK_N)
    for tile in range(first, end, tl.num_programs(0)):
        row, col = _place(tile, n_rows, N_COLS, BLOCK_M, BLOCK_N)
        x, last = _rows_of_tile(x_ptr, row, n_rows, inner_stride, BLOCK_M, BLOCK_K)
        weight = weight_ptr + col.to(tl.int64) * inner_stride + cols[None, :] * inner_stride + inner[:, None]
        parts = _quarters(_multiplied(x, weight, BLOCK_K, inner_stride, ACC, BLOCK_M, BLOCK_N, BLOCK_K).to(LOW))

        out, offsets, mask = _part_of_tile(row, col, last, N_COLS, BLOCK_M, PART)
        for i in tl.static_range(4):
            if h_ptr is not None:
                tl.store(h_ptr + (out + i * PART) + offsets, parts[i], mask)
            h = parts[i].to(ACC)
            if bias_ptr is not None:
                h += tl.load(bias_ptr + (col + i * PART) + part_cols).to(ACC)[None, :]
            tl.store(y_ptr + (out + i * PART) + offsets, activate(h, ACTIVATION, EXACT).to(LOW), mask)


@triton.jit(do_not_specialize=["n_rows"])
def feed_forward_bwd_kernel(
    dout_ptr, weight_ptr, bias_ptr, h_ptr, dh_ptr, y_ptr, sums_ptr, n_rows, inner_stride,
    N_COLS: tl.constexpr, ACTIVATION: tl.constexpr, PERSISTENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    LOW: tl.constexpr = dh_ptr.dtype.element_ty
    EXACT: tl.constexpr = LOW.primitive_bitwidth > 16
    PART: tl.constexpr = BLOCK_N // 4
    cols, inner, part_cols = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, PART)
    first, end = _tiles(n_rows, N_COLS, PERSISTENT, BLOCK_M, BLOCK_N)
    for tile in range(first, end, tl.num_programs(0)):
        row, col = _place(tile, n_rows, N_COLS, BLOCK_M, BLOCK_N)
        dout, last = _rows_of_tile(dout_ptr, row, n_rows, inner_stride, BLOCK_M, BLOCK_K)
        weight = weight_ptr + col + inner[:, None] * N_COLS + cols[None, :]
        parts = _quarters(_multiplied(dout, weight, BLOCK_K * N_COLS, inner_stride, ACC, BLOCK_M, BLOCK_N, BLOCK_K).to(LOW))

        out, offsets, mask = _part_of_tile(row, col, last, N_COLS, BLOCK_M, PART)
        for i in tl.static_range(4):
            h = tl.load(h_ptr + (out + i * PART) + offsets, mask, other=0.0).to(ACC)
            if bias_ptr is not None:
                h += tl.load(bias_ptr + (col + i * PART) + part_cols).to(ACC)[None, :]
            dh = activation_backward(parts[i].to(ACC), h, ACTIVATION, EXACT)
            tl.store(dh_ptr + (out + i * PART) + offsets, dh.to(LOW), mask)
            if y_ptr is not None:
                tl.store(y_ptr + (out + i * PART) + offsets, activate(h, ACTIVATION, EXACT).to(LOW), mask)
            if sums_ptr is not None:
                dbias = tl.sum(tl.where(mask, dh, 0.0), axis=0)
                tl.store(sums_ptr + (row // BLOCK_M * N_COLS + col + i * PART) + part_cols, dbias)


def work(part: str, n_rows: int, n_inner: int, n_cols: int, like: Tensor, activation: str) -> Work:
    """The launch for contiguous tensors of the dtype of `like`.

    PRODUCT: x [n_rows, n_inner], weight [n_cols, n_inner]; writes h and y [n_rows, n_cols].
    GRADIENT: dout [n_rows, n_inner], weight [n_inner, n_cols], h [n_rows, n_cols]; writes dh, y and the sums [rows_of_sums,
    n_cols] in float32 (float64 for float64).
    """
    config = choose(part, like, n_cols)
    tiles = cdiv(n_rows, config.BLOCK_M) * (n_cols // config.BLOCK_N)
    persistent = config.programs_per_multiprocessor is not None
    numbers = {
        "n_rows": n_rows,
        "inner_stride": n_inner,
        "N_COLS": n_cols,
        "ACTIVATION": activation,
        "PERSISTENT": persistent,
        "ACC": accumulator(like.dtype),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
    }
    kernel = feed_forward_fwd_kernel if part == PRODUCT else feed_forward_bwd_kernel
    return Work(kernel, resident_programs(config, like, tiles) if persistent and tiles else tiles, config, numbers)


def rows_of_sums(n_rows: int, n_cols: int, like: Tensor) -> int:
    """The number of rows of sums that GRADIENT writes."""
    return cdiv(n_rows, choose(GRADIENT, like, n_cols).BLOCK_M)


def _divides(config: Config, n_inner: int, n_cols: int) -> bool:
    """Whether tiles divide all sizes but the number of rows: the kernels mask rows only."""
    return n_inner % config.BLOCK_K == 0 and n_cols % config.BLOCK_N == 0 and n_inner > 0


def is_on(part: str, like: Tensor, n_rows: int, n_inner: int, n_cols: int, activation: str) -> bool:
    """Whether a product of this size is PRODUCT's or GRADIENT's kernel rather than cuBLAS and bias_gelu."""
    name, itemsize = table_of(like), like.element_size()
    if activation not in ACTIVATIONS or KERNELS[part == GRADIENT] in failures.reasons:
        return False
    if not n_rows or itemsize not in TABLES[part][name] or not _divides(choose(part, like, n_cols), n_inner, n_cols):
        return False
    if _decided is not None:
        return _decided[part == GRADIENT]
    least = FUSED[part].get(name, {}).get(itemsize, {}).get((n_inner, n_cols))
    return least is not None and n_rows >= least


@contextmanager
def decided(product: bool, gradient: bool) -> Iterator[None]:
    """Within the block each of the two is on wherever it can be, or off, whatever the table says. Layers' cached plans do not
    change."""
    global _decided
    before, _decided = _decided, (product, gradient)
    try:
        yield
    finally:
        _decided = before
