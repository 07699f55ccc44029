"""ALIGNED tells kernels that rows of a head start at multiples of 16 bytes: only where that holds for all tensors.

Elsewhere a 16-byte load ends the program on a GPU. The interpreter cannot notice that, so the flag is read off the launches.
"""

import itertools

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.kernels.core.launch import recording
from fastbert.testing.attention import FORWARD, backward_of, check, make_inputs, normal
from fastbert.testing.rows import run

from ..layouts import offset
from .test_layouts import every_second, head_size_first, heads_first, shared_heads

HALF, SINGLE = torch.float16, torch.float32
SHAPE = (2, 5, 3, 40)


def aligned_kernels(inputs, dy=None, **options):
    """{kernel: ALIGNED} for a forward and a backward that are recorded instead of run."""
    seen = {}
    with recording("sm_90", lambda kernel, programs, config, arguments: seen.update({kernel.__name__: arguments["ALIGNED"]})):
        run(attention, inputs, inputs["q"].new_empty(inputs["q"].shape) if dy is None else dy, **options)
        assert list(seen) == [FORWARD, *backward_of(inputs, options)]
    return seen


def rows_of(product, names="qkv"):
    """Views of one product [batch, length, 3, heads, D]."""
    return dict(zip(names, product.unbind(2), strict=True))


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype, head_sizes", [(HALF, (8, 24, 40, 56, 72, 104)), (SINGLE, (4, 12, 20, 40))], ids=str)
def test_head_sizes_that_16_bytes_divide(dtype, head_sizes):
    for head_size in head_sizes:
        assert all(aligned_kernels(make_inputs(2, 5, 3, head_size, dtype)).values()), head_size
        assert all(aligned_kernels(rows_of(normal(2, 5, 3, 3, head_size, dtype=dtype))).values()), head_size


@pytest.mark.no_launch
@pytest.mark.parametrize("dtype, head_sizes", [(HALF, (1, 4, 12, 20, 59)), (SINGLE, (1, 2, 6, 59))], ids=str)
def test_head_sizes_that_16_bytes_do_not_divide(dtype, head_sizes):
    for head_size in head_sizes:
        assert not any(aligned_kernels(make_inputs(2, 5, 3, head_size, dtype)).values()), head_size


@pytest.mark.no_launch
@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
def test_nobody_asks_at_berts_head_sizes(head_size):
    """Where 16 divides every stride, Triton infers it."""
    assert not any(aligned_kernels(make_inputs(2, 5, 3, head_size, HALF)).values())


@pytest.mark.no_launch
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("misaligned", ["an odd place", "odd rows", "odd columns", "every second", "heads apart"])
def test_one_tensor_that_is_not_aligned(name, misaligned):
    """ALIGNED is false in every kernel that reads it."""
    inputs = make_inputs(*SHAPE[:3], SHAPE[3], HALF)
    wider = normal(*SHAPE[:3], SHAPE[3] + 8, dtype=HALF)
    inputs[name] = {
        "an odd place": lambda: offset(inputs[name]),
        "odd rows": lambda: normal(*SHAPE[:3], SHAPE[3] + 1, dtype=HALF)[..., : SHAPE[3]],
        "odd columns": lambda: wider[..., 3 : 3 + SHAPE[3]],
        "every second": lambda: every_second(inputs[name]),
        "heads apart": lambda: head_size_first(inputs[name]),
    }[misaligned]()
    assert not any(aligned_kernels(inputs).values())


@pytest.mark.no_launch
def test_an_upstream_gradient_that_is_not_aligned():
    found = aligned_kernels(make_inputs(2, 5, 3, 40, HALF), offset(normal(*SHAPE, dtype=HALF)))
    assert found.pop(FORWARD) and not any(found.values())


@pytest.mark.no_launch
@pytest.mark.parametrize("layout", [heads_first, shared_heads], ids=lambda f: f.__name__)
def test_strided_rows_that_are_aligned(layout):
    inputs = {name: layout(x) for name, x in make_inputs(2, 5, 3, 40, HALF).items()}
    assert all(aligned_kernels(inputs).values())


@pytest.mark.no_launch
def test_it_is_true_of_every_address():
    """For views with any start and row length, the flag is compared with every row's address."""
    wide = normal(2, 5, 3, 3, 64, dtype=HALF)
    truths = set()
    for start, width, head_size in itertools.product((0, 1, 4, 8, 12, 16), (44, 48, 63, 64), (24, 40)):
        part = wide.flatten()[: 2 * 5 * 3 * 3 * width].view(2, 5, 3, 3, width)[..., start : start + head_size]
        if part.shape[-1] < head_size:
            continue
        for inputs in (rows_of(part), dict.fromkeys("qkv", part[:, :, 0])):
            heads = [x[b, s, h] for x in inputs.values() for b, s, h in itertools.product(range(2), range(5), range(3))]
            aligned = not any(row.data_ptr() % 16 for row in heads)
            assert aligned_kernels(inputs)[FORWARD] == aligned, (start, width, head_size)
            truths.add(aligned)
    assert truths == {False, True}


@pytest.mark.parametrize("head_size", [8, 24, 72])
@pytest.mark.parametrize("at", [0, 1])
def test_values_do_not_depend_on_it(at, head_size):
    product = normal(2, 19, 3, 2, head_size + 8, dtype=HALF)[..., at : at + head_size]
    check(rows_of(product), p=0.1)
