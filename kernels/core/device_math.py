"""Pure maths shared by the kernels, forward and backward: activations, dropout's keep mask, LayerNorm.

Every function is jit code on tiles in registers; none loads or stores. All compute in the type of their arguments, which the
kernels cast to float32 first (float64 for float64).
"""

import triton
import triton.language as tl


@triton.jit
def offsets(rows, cols, row_stride, col_stride):
    """int64 element offsets of rows and cols, which broadcast: 2**31 elements are only 2.8 million tokens of BERT-base."""
    return rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride


@triton.jit
def tile_offsets(rows, cols, row_stride, col_stride):
    """[rows, cols] element offsets, see offsets."""
    return offsets(rows[:, None], cols[None, :], row_stride, col_stride)


@triton.jit
def block_rows(block, BLOCK_M: tl.constexpr):
    """int64 row numbers of a block (in the interpreter a loop counter is a plain int, which has no `to`)."""
    return (tl.zeros([BLOCK_M], tl.int64) + block) * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def columns(BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """0 ... BLOCK_N - 1, VECTOR adjacent ones per thread.

    VECTOR is 16 bytes of the widest type that a kernel loads or stores. By default Triton takes 16 bytes of the narrowest and
    moves the wider ones between threads before they are stored.
    """
    return tl.max_contiguous(tl.arange(0, BLOCK_N), VECTOR)


@triton.jit
def place_of_tile(program, N_COLS: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """(block of rows, columns) of a program, where a row takes several: adjacent programs share rows. VECTOR as in columns."""
    n_col_blocks: tl.constexpr = (N_COLS + BLOCK_N - 1) // BLOCK_N
    return program // n_col_blocks, (program % n_col_blocks) * BLOCK_N + columns(BLOCK_N, VECTOR)


@triton.jit
def chunked_columns(CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """[CHUNKS, 1, BLOCK_N] column numbers of a [CHUNKS, rows, BLOCK_N] tile.

    Triton distributes a tile over warps from its last axis to its first. If that axis has as many columns as a warp loads at
    once, each warp holds whole rows, and a row's sum needs neither shared memory nor a barrier.
    """
    return tl.arange(0, CHUNKS)[:, None, None] * BLOCK_N + columns(BLOCK_N, VECTOR)[None, None, :]


# A tile of chunks, [CHUNKS * BLOCK_M, BLOCK_N], holds BLOCK_M whole rows: the first BLOCK_N columns of each, then the next
# BLOCK_N of each, and so on. Triton distributes a tile over warps from its last axis to its first. With as many columns per
# chunk as a warp loads at once, each warp holds whole rows, and a row's sum needs neither shared memory nor a barrier:
# LayerNorm's backward rests on that. Chunks and rows share an axis, because Triton 3.6 and 3.7 differ in which of two axes the
# warps share.


@triton.jit
def columns_of_chunks(CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr):
    """[CHUNKS * BLOCK_M, BLOCK_N] column numbers; VECTOR as in columns."""
    return (tl.arange(0, CHUNKS * BLOCK_M) // BLOCK_M)[:, None] * BLOCK_N + columns(BLOCK_N, VECTOR)[None, :]


@triton.jit
def beside_chunks(x, CHUNKS: tl.constexpr):
    """[CHUNKS * BLOCK_M, 1]: the values [BLOCK_M] of the rows, beside each of a row's chunks."""
    return tl.reshape(tl.broadcast_to(x[None, :], [CHUNKS, x.shape[0]]), [CHUNKS * x.shape[0]])[:, None]


@triton.jit
def sums_of_rows(x, CHUNKS: tl.constexpr):
    """[CHUNKS * BLOCK_M, 1]: each row's sum, beside each of its chunks. Chunks are summed first: they are in one thread."""
    BLOCK_M: tl.constexpr = x.shape[0] // CHUNKS
    return beside_chunks(tl.sum(tl.sum(tl.reshape(x, [CHUNKS, BLOCK_M, x.shape[1]]), axis=0), axis=1), CHUNKS)


@triton.jit
def sums_of_columns(x, CHUNKS: tl.constexpr):
    """[CHUNKS, BLOCK_N]: each column's sum over the rows of a tile of chunks."""
    return tl.sum(tl.reshape(x, [CHUNKS, x.shape[0] // CHUNKS, x.shape[1]]), axis=1)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_and_slope(x):
    """sigmoid(x) and its derivative, which is not computed as s * (1 - s): near s = 1 that difference is mostly rounding
    error."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * larger, larger), e * larger * larger


@triton.jit
def gelu_tanh_argument(x):
    # 0.5 * (1 + tanh(u)) is sigmoid(2u). Triton has no tanh that also runs in its interpreter.
    return 2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def normal(x, EXACT: tl.constexpr):
    """The normal distribution's cumulative and density functions at x.

    Without EXACT for 16-bit tensors, whose relative precision is 2e-4 at best: one exponential and a polynomial, 3e-6 off, in
    half of the instructions of libdevice's erf and exp, which would make the kernel compute-bound. The tail is the density
    times a polynomial in 1 / (1 + 0.303 |x|), the form of Abramowitz and Stegun 7.1.26 with coefficients that bound the
    relative error (bench/FINDINGS.md). exp2 and rsqrt are one instruction each; exp and division are not.
    """
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        bell = tl.exp(-0.5 * x * x)
    else:
        bell = tl.exp2(x * x * (-0.5 * 1.4426950408889634))
        v = 1.0 + 0.303 * tl.abs(x)
        t = tl.rsqrt(v * v)
        series = 0.147147288 + t * (-0.0185797452 + t * (0.215696782 + t * -0.0797971527))
        tail = bell * t * (0.121363681 + t * (0.114168129 + t * series))
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return cdf, 0.3989422804014327 * bell


@triton.jit
def activation(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """gelu (exact), gelu_tanh (Hendrycks and Gimpel, arXiv:1606.08415), relu or silu of x; EXACT as in normal."""
    tl.static_assert(ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu" or ACTIVATION == "silu")
    if ACTIVATION == "gelu":
        cdf, _ = normal(x, EXACT)
        y = x * cdf
    elif ACTIVATION == "gelu_tanh":
        y = x * sigmoid(gelu_tanh_argument(x))
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)  # tl.maximum would turn NaN into 0
    else:
        y = x * sigmoid(x)
    return y


@triton.jit
def activation_backward(dy, x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """dL/dx from dL/dy and the activation's input x; EXACT as in normal."""
    if ACTIVATION == "gelu":
        cdf, pdf = normal(x, EXACT)
        dx = dy * (cdf + x * pdf)
    elif ACTIVATION == "gelu_tanh":
        gate, slope = sigmoid_and_slope(gelu_tanh_argument(x))
        dx = dy * (gate + x * slope * (2.0 * 0.7978845608028654) * (1.0 + 3.0 * 0.044715 * x * x))
    elif ACTIVATION == "relu":
        dx = tl.where(x <= 0, 0.0, dy)
    else:
        gate, slope = sigmoid_and_slope(x)
        dx = dy * (gate + x * slope)
    return dx


@triton.jit
def keep_mask(seed, rows, cols, P_DROP: tl.constexpr):
    """True where dropout keeps element (row, col): a pure function of seed, row and col. rows and cols broadcast.

    Philox4x32 with seven rounds (Salmon et al., SC'11: seven pass BigCrush) yields 128 bits per call. A decision takes 16 of
    them, so p is rounded to 1/65536 and eight adjacent columns share a call. Triton gives a thread eight adjacent elements of a
    16-bit type, and the compiler merges their equal calls. P_DROP is a constexpr, one compilation per value, because the scale
    is then exact in every dtype.
    """
    THRESHOLD: tl.constexpr = int(P_DROP * 65536 + 0.5)
    group = (cols >> 3).to(tl.uint32)
    row_low = (rows & 0xFFFFFFFF).to(tl.uint32)
    row_high = (rows.to(tl.int64) >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, row_low, row_high, group * 0, n_rounds=7)
    # Bit by bit: with (cols >> 1) & 3 the compiler does not see that neighbours share a call.
    pair = tl.where((cols & 4) == 0, tl.where((cols & 2) == 0, w0, w1), tl.where((cols & 2) == 0, w2, w3))
    bits = tl.where((cols & 1) == 0, pair & 0xFFFF, pair >> 16)
    return bits >= THRESHOLD


@triton.jit
def dropout(x, keep, P_DROP: tl.constexpr):
    """x / (1 - p) where kept, else 0 (also for inf and NaN, as p = 1 requires). It is its own backward."""
    SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    return tl.where(keep, x * SCALE, 0.0)


@triton.jit
def layernorm_statistics(x, col_mask, n_cols, eps):
    """Mean and 1 / sqrt(variance + eps) of every row of a [rows, cols] tile that holds whole rows.

    Two passes over registers instead of E[x^2] - E[x]^2, which is all rounding error when the mean is far from zero.
    """
    mean = tl.sum(x, axis=1) / n_cols
    centred = tl.where(col_mask[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / n_cols
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def layernorm(x, weight, bias, col_mask, n_cols, eps):
    """(y, mean, rstd) of a tile that holds whole rows."""
    mean, rstd = layernorm_statistics(x, col_mask, n_cols, eps)
    return (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :], mean, rstd


@triton.jit
def layernorm_backward(dy_weighted, x_hat, rstd, n_cols, CHUNKS: tl.constexpr):
    """dL/dx of x_hat = (x - mean) * rstd from dL/dx_hat, both tiles of chunks that are 0 past the last column."""
    mean_dy = sums_of_rows(dy_weighted, CHUNKS) / n_cols
    mean_dy_x_hat = sums_of_rows(dy_weighted * x_hat, CHUNKS) / n_cols
    return (dy_weighted - mean_dy - x_hat * mean_dy_x_hat) * rstd
