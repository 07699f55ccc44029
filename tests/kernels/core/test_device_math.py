"""Dropout's bits: their rate, uniformity and independence; and the maths shared by the kernels."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastbert.kernels.core.configs import Config
from fastbert.kernels.core.device_math import layernorm_statistics, normal, tile_offsets
from fastbert.kernels.core.launch import launch
from fastbert.testing.rows import DEVICE

from ..masks import draws, keep_masks, philox

ROWS, COLS = 512, 8192  # 4,194,304 draws
SIGMAS = 5


def correlation(one, other):
    """Pearson's correlation of two boolean tensors."""
    count, a, b = one.numel(), int(one.sum()), int(other.sum())
    covariance = int((one & other).sum()) / count - a * b / count**2
    return covariance / math.sqrt(a * (count - a) * b * (count - b) / count**4)


@pytest.mark.parametrize("p, seed", [(0.1, 0), (0.1, 2**61 + 12345), (0.5, 1), (0.9, 2), (0.003, 3)])
def test_keep_rate(p, seed):
    """Within five standard deviations of 1 - p; rounding p to 1/65536 is 0.02 of one here."""
    keep = keep_masks(p, ROWS, COLS, seed=seed)
    deviation = math.sqrt(p * (1 - p) / keep.numel())
    assert abs(float(keep.double().mean()) - (1 - p)) < SIGMAS * deviation


def test_every_row_and_column_has_the_rate():
    p, keep = 0.1, keep_masks(0.1, ROWS, COLS, seed=1)
    for rates in (keep.double().mean(0), keep.double().mean(1)):
        deviation = math.sqrt(p * (1 - p) * len(rates) / keep.numel())
        # Five deviations are for one rate; the largest among thousands lies further out.
        assert float((rates - (1 - p)).abs().max()) < (SIGMAS + 1) * deviation


@pytest.mark.no_launch
def test_philox_gives_the_published_numbers():
    """The first known answers of Random123 (tests/kat_vectors), for seven rounds and for ten."""
    ones = 2**32 - 1
    assert [int(w) for w in philox((0, 0, 0, 0), (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(w) for w in philox((0, 0, 0, 0), (0, 0), 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox([ones] * 4, [ones] * 2, 10)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 65536, 3 / 65536, 272 / 65536, 1 - 1 / 65536])
@pytest.mark.parametrize("seed, first_row", [(0, 0), (2**62 - 1, 2**32 - 8), (2**32 + 77, 2**40 + 5)])
def test_decisions_are_those_draws_against_p(p, seed, first_row):
    keep = keep_masks(p, 32, 256, seed=seed, first_row=first_row).cpu().numpy()
    assert (keep == (draws(32, 256, seed=seed, first_row=first_row) >= round(p * 65536))).all()


@pytest.mark.no_launch
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_draws_are_uniform(seed):
    """The Kolmogorov-Smirnov distance between 4,194,304 draws and the uniform distribution on 16 bits."""
    counts = np.bincount(draws(ROWS, COLS, seed=seed).ravel(), minlength=65536)
    distance = np.abs(np.cumsum(counts) / counts.sum() - np.arange(1, 65537) / 65536).max()
    assert distance < 2.0 / math.sqrt(counts.sum())  # 999 of 1,000 uniform samples are closer


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_uncorrelated(p):
    """Columns up to 17 apart (eight share one Philox call) and rows up to 3 apart."""
    keep = keep_masks(p, ROWS // 2, COLS, seed=4)
    limit = SIGMAS / math.sqrt(keep.numel() * 0.98)
    for lag in range(1, 18):
        assert abs(correlation(keep[:, :-lag], keep[:, lag:])) < limit, lag
    for lag in (1, 2, 3):
        assert abs(correlation(keep[:-lag], keep[lag:])) < limit, lag


def test_places_within_a_group_of_eight_are_uncorrelated():
    groups = keep_masks(0.5, 128, COLS, seed=5).view(-1, 8)
    limit = SIGMAS / math.sqrt(len(groups))
    for one in range(8):
        for other in range(one):
            assert abs(correlation(groups[:, one], groups[:, other])) < limit, (one, other)


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**61])
def test_seeds_are_uncorrelated(other):
    """Also seeds that differ only in one bit of the high word."""
    one, two = (keep_masks(0.5, 128, COLS, seed=seed) for seed in (0, other))
    assert abs(correlation(one, two)) < SIGMAS / math.sqrt(one.numel())


@pytest.mark.parametrize("first_row", [2**31, 2**32, 2**33, 2**40])
def test_row_counters_far_apart_are_uncorrelated(first_row):
    """A 32-bit counter would repeat the first rows at 2**32."""
    one, two = (keep_masks(0.5, 128, COLS, first_row=start) for start in (0, first_row))
    assert abs(correlation(one, two)) < SIGMAS / math.sqrt(one.numel())


def test_rows_are_numbered_across_the_32_bit_boundary():
    """Row 2**32 + 3 draws the same bits, whichever row a tile starts at."""
    before = keep_masks(0.5, 16, 64, first_row=2**32 - 8)
    assert torch.equal(before[8:], keep_masks(0.5, 8, 64, first_row=2**32))


@pytest.mark.parametrize("p, rate", [(1.0, 0.0), (1e-6, 1.0), (1 - 1e-6, 0.0)])
def test_the_ends(p, rate):
    assert float(keep_masks(p, 128, COLS).double().mean()) == rate


def test_a_larger_p_drops_what_a_smaller_one_drops():
    masks = [keep_masks(p, 32, COLS, seed=6) for p in (0.1, 0.3, 0.7)]
    assert torch.equal(masks[0] & masks[1], masks[1]) and torch.equal(masks[1] & masks[2], masks[2])


@triton.jit
def offsets_kernel(out_ptr, first_row, row_stride, col_stride, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    offsets = tile_offsets(index + first_row, index, row_stride, col_stride)
    tl.store(out_ptr + index[:, None] * BLOCK + index[None, :], offsets)


@pytest.mark.parametrize("first_row, row_stride, col_stride", [(0, 768, 1), (2_900_000, 768, 1), (7, 2**31 + 5, 3)])
def test_offsets_do_not_wrap_at_32_bits(first_row, row_stride, col_stride):
    out = torch.zeros(16, 16, dtype=torch.int64, device=DEVICE)
    strides = {"row_stride": row_stride, "col_stride": col_stride}
    launch(offsets_kernel, 1, Config(16, 1), out, out_ptr=out, first_row=first_row, **strides, BLOCK=16)
    index = torch.arange(16, device=DEVICE)
    assert torch.equal(out, (index + first_row)[:, None] * row_stride + index[None, :] * col_stride)


@triton.jit
def statistics_kernel(x_ptr, mean_ptr, rstd_ptr, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + tile_offsets(rows, cols, n_cols, 1), (cols < n_cols)[None, :], other=0.0)
    mean, rstd = layernorm_statistics(x, cols < n_cols, n_cols, 0.0)
    tl.store(mean_ptr + rows, mean)
    tl.store(rstd_ptr + rows, rstd)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, -1e4])
@pytest.mark.parametrize("width", [2, 37, 64])
def test_statistics_far_from_zero(width, mean):
    """E[x^2] - E[x]^2 in float32 has no digit left if the mean is 10,000 deviations."""
    # Multiples of 1/64 add up exactly in float32, so that only the method can lose digits.
    x = torch.arange(4 * width, dtype=torch.float64).mul(7).remainder(64).div(64).view(4, width) + mean
    out, single = torch.zeros(2, 4, device=DEVICE), x.to(DEVICE, torch.float32)
    pointers = {"x_ptr": single, "mean_ptr": out[0], "rstd_ptr": out[1]}
    launch(statistics_kernel, 1, Config(4, 1), single, **pointers, n_cols=width, BLOCK_M=4, BLOCK_N=64)
    expected = torch.stack([x.mean(1), x.var(1, unbiased=False).rsqrt()])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=0.0)


@triton.jit
def normal_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    cdf, pdf = normal(tl.load(x_ptr + index, index < n, other=0.0), False)
    tl.store(out_ptr + index, cdf, index < n)
    tl.store(out_ptr + n + index, pdf, index < n)


def test_the_normal_distribution_of_16_bit_types():
    """As accurate as device_math.normal claims. A hundred times worse would pass for one rounding in float16."""
    x = torch.linspace(-3.0, 6.0, 3001, device=DEVICE)
    out = torch.zeros(2, len(x), device=DEVICE)
    launch(normal_kernel, 1, Config(4096, 1), x, x_ptr=x, out_ptr=out, n=len(x), BLOCK=4096)
    x = x.double()
    expected = torch.stack([torch.special.erfc(-x / math.sqrt(2)) / 2, torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)])
    assert float((out.double() / expected - 1).abs().max()) < 3e-6
