"""Queries, keys and values that have most in common, as in BERT's upper layers: gradients of scores nearly cancel.

Every row's gradients of scores sum to 0. In 16 bits the backward's delta comes from rounded outputs; an error of it that stayed
in that sum would have the same direction in all rows, and would be larger than the gradients themselves.
"""

import pytest
import torch

from fastbert.testing.attention import check, normal, tiles
from fastbert.testing.rows import DEVICE, seed_tensor

from ..cases import dtype_name

BF16, FP16 = torch.bfloat16, torch.float16
HEADS, HEAD_SIZE = 2, 64


def alike(rows, dtype, spread=0.05):
    """[*rows, HEADS, HEAD_SIZE]: one row for all, of size 1, and a little of each row's own."""
    return (normal(HEADS, HEAD_SIZE) + spread * normal(*rows, HEADS, HEAD_SIZE)).to(dtype)


def inputs_of(rows, dtype):
    return {name: alike(rows, dtype) for name in ("q", "k", "v")}


def assert_cancelled(results, lengths):
    """The sums of dk over the keys of each sequence are 0 but for its rounding."""
    parts = results["dk"].double().flatten(0, -3).split(lengths)
    left = max(part.sum(0).abs().max() for part in parts)
    # Roundings of single keys have signs of their own: their sum grows with the root of their number.
    eps, most = torch.finfo(results["dk"].dtype).eps, results["dk"].double().abs().max()
    assert left < eps * most * max(lengths) ** 0.5, (float(left), float(most))


OPTIONS = ("plain", "causal", "dropped", "padded", "masked")


def options_of(option, batch, length):
    seen = torch.arange(length, device=DEVICE) < torch.tensor([length - 3 * i for i in range(batch)], device=DEVICE)[:, None]
    return {
        "plain": {},
        "causal": {"causal": True},
        "dropped": {"p": 0.1, "seed": seed_tensor(3)},
        "padded": {"key_mask": seen},
        "masked": {"mask": seen[:, None, None]},
    }[option]


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_of_rows_that_are_alike(option):
    inputs, dy = inputs_of((2, 150), FP16), alike((2, 150), FP16)
    with tiles((32, 32)):
        results = check(inputs, dy, **options_of(option, 2, 150))
    assert_cancelled(results, [150, 150])


@pytest.mark.parametrize("option", ("plain", "causal", "dropped", "padded"))
def test_gradients_of_short_sequences_that_are_alike(option, launches):
    inputs, dy = inputs_of((2, 100), FP16), alike((2, 100), FP16)
    results = check(inputs, dy, **options_of(option, 2, 100))
    assert launches()["attention_bwd_short_kernel"]
    assert_cancelled(results, [100, 100])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_at_berts_shapes(option, length, dtype):
    inputs, dy = inputs_of((4, length), dtype), alike((4, length), dtype)
    results = check(inputs, dy, **options_of(option, 4, length))
    assert_cancelled(results, [length] * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)
def test_gradients_of_packed_rows(dtype):
    lengths = [512, 1, 383, 130]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    inputs, dy = inputs_of((sum(lengths),), dtype), alike((sum(lengths),), dtype)
    results = check(inputs, dy, cu_seqlens=bounds, max_seqlen=512)
    assert_cancelled(results, lengths)
