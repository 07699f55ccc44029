"""The quality of attention's dropout bits: their rate, and the independence of neighbours, heads and seeds."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastbert.kernels.attention.tiles import keep_scores, row_keys
from fastbert.kernels.core.configs import Config
from fastbert.kernels.core.launch import launch
from fastbert.testing.attention import drawn_keep
from fastbert.testing.rows import DEVICE, seed_tensor

SIGMAS = 5.0
QUERIES, KEYS = 512, 512


@triton.jit
def keep_kernel(
    seed_ptr, keep_ptr, first_head, first_query, first_key, n_queries, N: tl.constexpr, M: tl.constexpr, P: tl.constexpr
):
    """One tile of M queries and N keys per program; a head's tiles are stacked."""
    tiles = n_queries // M
    positions, keys = tl.arange(0, M), tl.arange(0, N)
    rows = tl.program_id(0) % tiles * M + positions
    row_key = row_keys(tl.load(seed_ptr), tl.program_id(0) // tiles + first_head, rows + first_query)
    keep = keep_scores(row_key[:, None], positions[:, None], keys[None, :], first_key, P)
    rows += tl.program_id(0) // tiles * n_queries
    tl.store(keep_ptr + rows.to(tl.int64)[:, None] * N + keys[None, :], keep.to(tl.int8))


def keeps(p, heads=1, queries=QUERIES, keys=KEYS, *, seed=0, first_head=0, first_query=0, first_key=0):
    """bool [heads, queries, keys]: what the kernels' own functions keep. Multiples of 64 queries, 2**n keys."""
    keep = torch.full((heads, queries, keys), -1, dtype=torch.int8, device=DEVICE)
    block = math.gcd(queries, 1024) if DEVICE.type == "cpu" else 16  # the interpreter's time depends on the number of programs
    arguments = {"first_head": first_head, "first_query": first_query, "first_key": first_key, "n_queries": queries}
    launch(
        keep_kernel,
        heads * queries // block,
        Config(block, 4),
        keep,
        seed_ptr=seed_tensor(seed),
        keep_ptr=keep,
        **arguments,
        N=keys,
        M=block,
        P=p,
    )
    return keep.bool()


def correlation(one, other):
    """Pearson's correlation of two masks."""
    pair = torch.stack([one.flatten(), other.flatten()]).float()
    return float(torch.corrcoef(pair)[0, 1])


def assert_uncorrelated(one, other):
    assert abs(correlation(one, other)) < SIGMAS / math.sqrt(one.numel())


def test_these_are_the_bits_that_attention_draws():
    assert torch.equal(keeps(0.3, heads=3, queries=64, keys=128, seed=5)[None], drawn_keep(1, 3, 64, 128, 0.3, seed_tensor(5)))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_keep_rate(p):
    """Over 4,194,304 draws in 16 heads."""
    kept = int(keeps(p, heads=16, seed=1).sum())
    n = 16 * QUERIES * KEYS
    assert abs(kept / n - (1 - p)) < SIGMAS * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("axis", ["queries", "keys"])
def test_rates_of_rows_and_of_columns_are_binomial(axis, p):
    """The Kolmogorov-Smirnov distance between the counts of 65,536 rows (of 64 keys) or columns and the binomial distribution;
    999 of 1,000 independent samples are closer."""
    rows = keeps(p, heads=64, queries=1024, keys=64, seed=2) if axis == "queries" else keeps(p, 128, 64, 512, seed=2)
    counts = rows.sum(-1 if axis == "queries" else -2).flatten().cpu()
    assert len(counts) == 65536
    k = np.arange(65)
    log_choose = np.array([math.lgamma(65) - math.lgamma(i + 1) - math.lgamma(65 - i) for i in k])
    expected = np.cumsum(np.exp(log_choose + k * math.log(1 - p) + (64 - k) * math.log(p)))
    found = np.cumsum(np.bincount(counts.numpy(), minlength=65)) / len(counts)
    assert np.abs(found - expected).max() < 2.0 / math.sqrt(len(counts)) < 0.01


LAGS = [(0, 1), (0, 2), (0, 7), (0, 8), (0, 9), (0, 16), (0, 64), (1, 0), (2, 0), (7, 0), (8, 0), (9, 0), (16, 0), (64, 0)]
LAGS += [(1, 1), (1, -1), (8, 8), (8, -8), (1, 8), (8, 1), (8, 16), (16, 8), (16, -16)]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_uncorrelated(p):
    """Above all the four scores, queries and keys 8 apart, that share most of their hash."""
    keep = keeps(p, heads=16, seed=4)
    for queries, keys in LAGS:
        one = keep[:, : QUERIES - queries, max(0, -keys) : KEYS - max(0, keys)]
        other = keep[:, queries:, max(0, keys) : KEYS + min(0, keys)]
        found, limit = correlation(one, other), SIGMAS / math.sqrt(one.numel())
        assert abs(found) < limit, f"queries {queries}, keys {keys} apart: {found:.5f}, at most {limit:.5f}"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_four_that_share_a_hash_are_independent(p):
    """Each pattern of kept and dropped is as frequent as it should be; correlation sees only pairs."""
    keep = keeps(p, heads=16, seed=7).view(16, QUERIES // 16, 2, 8, KEYS // 16, 2, 8)
    four = keep.permute(0, 1, 3, 4, 6, 2, 5).reshape(-1, 4)
    pattern = (four * torch.tensor([1, 2, 4, 8], device=DEVICE)).sum(-1)
    counts = torch.bincount(pattern, minlength=16).cpu()
    for bits in range(16):
        kept = bits.bit_count()
        expected = (1 - p) ** kept * p ** (4 - kept)
        sigma = math.sqrt(expected * (1 - expected) / len(pattern))
        assert abs(float(counts[bits]) / len(pattern) - expected) < SIGMAS * sigma, f"{bits:04b}"


@pytest.mark.parametrize("head", [1, 2, 12, 16, 192, 65536, 2**31 - 1])
def test_heads_are_uncorrelated(head):
    """Adjacent heads, the same head of the next sequence (12 and 16 on), and numbers past 16 bits."""
    assert_uncorrelated(keeps(0.5), keeps(0.5, first_head=head)[:1])


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**61])
def test_seeds_are_uncorrelated(other):
    """Layers and steps differ in their seeds, also by a single bit of the high word."""
    assert_uncorrelated(keeps(0.5), keeps(0.5, seed=other))


def test_a_head_is_not_the_next_seeds():
    """Philox's counter and key are separate: seed + 1 shifts neither the heads nor the queries."""
    one, other = keeps(0.5, heads=4), keeps(0.5, heads=4, seed=1)
    for shift in (1, 2):
        assert_uncorrelated(one[shift:], other[:-shift])
        assert_uncorrelated(one[:, shift:], other[:, :-shift])


@pytest.mark.parametrize("first", [4096, 2**16, 2**20])
def test_far_queries_and_keys_are_uncorrelated(first):
    """Further than any sequence of BERT's: no counter wraps."""
    assert_uncorrelated(keeps(0.5), keeps(0.5, first_query=first))
    assert_uncorrelated(keeps(0.5), keeps(0.5, first_key=first))


@pytest.mark.parametrize("first_query, first_key", [(16, 0), (0, 16), (64, 32), (48, 80)])
def test_a_tile_may_start_at_any_multiple_of_16(first_query, first_key):
    whole = keeps(0.5, queries=128, keys=128, seed=3)[:, first_query:, first_key:]
    part = keeps(0.5, queries=64, keys=64, seed=3, first_query=first_query, first_key=first_key)
    assert torch.equal(part[:, : whole.shape[1], : whole.shape[2]], whole[:, :64, :64])
