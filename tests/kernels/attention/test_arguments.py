"""Wrong arguments of attention: the error names the argument, what was expected and what came."""

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.kernels.attention.checks import MAX_HEAD_SIZE
from fastbert.testing.attention import make_inputs, normal
from fastbert.testing.rows import DEVICE, seed_tensor

pytestmark = pytest.mark.no_launch

NO_KERNEL = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def rows():
    """Packed rows: sequences of 4 and 6 rows."""
    return {name: normal(10, 2, 8) for name in ("q", "k", "v")}


def bounds(dtype=torch.int32):
    return torch.tensor([0, 4, 10], dtype=dtype, device=DEVICE)


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


def rejection(argument, inputs, **options):
    with pytest.raises(ValueError, match=rf"^{argument}: ") as error:
        attention(**inputs, **options)
    return str(error.value)


@pytest.mark.parametrize("dtype", NO_KERNEL, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_dtype_without_a_kernel(name, dtype):
    inputs = make_inputs(2, 5, 2, 8)
    inputs[name] = inputs[name].to(dtype)
    assert str(dtype) in rejection(name, inputs)


@pytest.mark.parametrize("name", ["k", "v"])
def test_another_dtype_than_that_of_q(name):
    inputs = make_inputs(2, 5, 2, 8)
    inputs[name] = inputs[name].half()
    assert "torch.float16" in rejection(name, inputs) and "torch.float32" in rejection(name, inputs)


@pytest.mark.parametrize("shape", [(), (8,), (5, 8), (5, 2, 8), (1, 2, 5, 2, 8)], ids=str)
def test_a_q_of_another_rank(shape):
    assert str(shape) in rejection("q", make_inputs(2, 5, 2, 8) | {"q": zeros(*shape)})


@pytest.mark.parametrize("shape", [(10, 8), (2, 5, 2, 8)], ids=str)
def test_a_packed_q_of_another_rank(shape):
    assert "[T, heads, D]" in rejection("q", dict.fromkeys("qkv", zeros(*shape)), cu_seqlens=bounds(), max_seqlen=6)


@pytest.mark.parametrize("head_size", [0, MAX_HEAD_SIZE + 1, 1024])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_a_head_size_without_a_kernel(packed, head_size):
    shape, options = ((10, 2), {"cu_seqlens": bounds(), "max_seqlen": 6}) if packed else ((2, 5, 2), {})
    assert str(head_size) in rejection("q", dict.fromkeys("qkv", zeros(*shape, head_size)), **options)


@pytest.mark.parametrize("shape", [(), (5, 2, 8), (3, 5, 2, 8), (1, 5, 2, 8), (2, 5, 2, 7)], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_another_shape(name, shape):
    """Shapes are not broadcast, although torch would: the gradient would have to be summed. Heads: test_grouped.py."""
    assert str(tuple(shape)) in rejection(name, make_inputs(2, 5, 2, 8) | {name: zeros(*shape)})


def test_values_of_another_length_than_the_keys():
    rejection("v", make_inputs(2, 5, 2, 8) | {"v": zeros(2, 6, 2, 8)})


@pytest.mark.parametrize("shape", [(9, 2, 8), (10, 3, 8), (10, 2, 7), (2, 5, 2, 8)], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
def test_another_shape_packed(name, shape):
    rejection(name, rows() | {name: zeros(*shape)}, cu_seqlens=bounds(), max_seqlen=6)


def test_packed_rows_need_max_seqlen():
    rejection("max_seqlen", rows(), cu_seqlens=bounds())


@pytest.mark.parametrize("name, shape", [("key_mask", (2, 6)), ("mask", (1, 1, 1, 1))])
def test_packed_rows_take_no_mask(name, shape):
    rejection("cu_seqlens", rows(), cu_seqlens=bounds(), max_seqlen=6, **{name: zeros(*shape, dtype=torch.bool)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8], ids=str)
def test_a_key_mask_that_is_not_bool(dtype):
    """1 means seen in some conventions and masked in others, so nothing is guessed."""
    assert str(dtype) in rejection("key_mask", make_inputs(2, 5, 2, 8), key_mask=zeros(2, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 4), (5, 2), (2, 1, 1, 5)], ids=str)
def test_a_key_mask_of_another_shape(shape):
    assert str(tuple(shape)) in rejection("key_mask", make_inputs(2, 5, 2, 8), key_mask=zeros(*shape, dtype=torch.bool))


@pytest.mark.parametrize(
    "shape", [(), (4,), (4, 5), (3, 5, 5), (2, 3, 5, 5), (3, 1, 1, 5), (1, 1, 5, 4), (1, 1, 1, 1, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_mask_that_does_not_broadcast(dtype, shape):
    assert str(tuple(shape)) in rejection("mask", make_inputs(2, 5, 2, 8), mask=zeros(*shape, dtype=dtype))


def test_a_mask_does_not_make_the_output_larger():
    rejection("mask", make_inputs(1, 5, 2, 8), mask=zeros(2, 1, 1, 5))


def test_a_mask_that_requires_a_gradient():
    mask = zeros(1, 2, 5, 5).requires_grad_()
    rejection("mask", make_inputs(2, 5, 2, 8), mask=mask)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf"), -1e-9])
def test_a_p_that_is_no_probability(p):
    assert str(p) in rejection("p", make_inputs(2, 5, 2, 8), p=p)


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        attention(*make_inputs(2, 5, 2, 8).values(), zeros(2, 5, dtype=torch.bool))


# Unchecked, each of these would fail inside a kernel or, worse, not fail.
PACKED = {"cu_seqlens": bounds(), "max_seqlen": 6}
WRONG = {
    "an integer mask is added": ("mask", {"mask": zeros(1, 1, 1, 5, dtype=torch.int64)}),
    "a byte mask is added": ("mask", {"mask": zeros(1, 1, 1, 5, dtype=torch.uint8)}),
    "a complex mask": ("mask", {"mask": zeros(1, 1, 1, 5, dtype=torch.complex64)}),
    "a mask elsewhere": ("mask", {"mask": zeros(1, 1, 1, 5, device="meta")}),
    "a key mask elsewhere": ("key_mask", {"key_mask": zeros(2, 5, dtype=torch.bool, device="meta")}),
    "bounds of another shape": (
        "key_bounds",
        {"key_mask": zeros(2, 5, dtype=torch.bool), "key_bounds": zeros(3, dtype=torch.int32)},
    ),
    "bounds of another dtype": (
        "key_bounds",
        {"key_mask": zeros(2, 5, dtype=torch.bool), "key_bounds": zeros(2, 3, dtype=torch.float32)},
    ),
    "bounds without a mask": ("key_bounds", {"key_bounds": zeros(2, 3, dtype=torch.int32)}),
    "cu_seqlens in int64": ("cu_seqlens", PACKED | {"cu_seqlens": bounds(torch.int64)}),
    "cu_seqlens in float32": ("cu_seqlens", PACKED | {"cu_seqlens": bounds(torch.float32)}),
    "cu_seqlens of rank 2": ("cu_seqlens", PACKED | {"cu_seqlens": bounds()[None]}),
    "cu_seqlens of rank 0": ("cu_seqlens", PACKED | {"cu_seqlens": bounds()[0]}),
    "cu_seqlens without an element": ("cu_seqlens", PACKED | {"cu_seqlens": bounds()[:0]}),
    "cu_seqlens elsewhere": ("cu_seqlens", PACKED | {"cu_seqlens": bounds().to("meta")}),
    "max_seqlen below 0": ("max_seqlen", PACKED | {"max_seqlen": -1}),
    "max_seqlen as a tensor": ("max_seqlen", PACKED | {"max_seqlen": torch.tensor(6)}),
    "max_seqlen without cu_seqlens": ("max_seqlen", {"max_seqlen": 6}),
    "queries' bounds of another length": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": bounds()[:-1], "max_seqlen_q": 6}),
    "queries' bounds in int64": ("cu_seqlens_q", PACKED | {"cu_seqlens_q": bounds(torch.int64), "max_seqlen_q": 6}),
    "queries' bounds without a length": ("max_seqlen_q", PACKED | {"cu_seqlens_q": bounds()}),
    "queries' length without bounds": ("max_seqlen_q", PACKED | {"max_seqlen_q": 6}),
    "queries' bounds of rows that are not packed": ("cu_seqlens_q", {"cu_seqlens_q": bounds(), "max_seqlen_q": 6}),
    "a seed elsewhere": ("seed", {"p": 0.5, "seed": seed_tensor(1).to("meta")}),
    "a seed in float32": ("seed", {"p": 0.5, "seed": seed_tensor(1).float()}),
    "a seed in int32": ("seed", {"p": 0.5, "seed": seed_tensor(1).int()}),
    "a seed that is a number": ("seed", {"p": 0.5, "seed": 1}),
    "two seeds": ("seed", {"p": 0.5, "seed": torch.tensor([1, 2], device=DEVICE)}),
    "a scale that is NaN": ("scale", {"scale": float("nan")}),
    "a scale that is infinite": ("scale", {"scale": float("inf")}),
    "k elsewhere": ("k", {"k": zeros(2, 5, 2, 8, device="meta")}),
    "v elsewhere": ("v", {"v": zeros(2, 5, 2, 8, device="meta")}),
}


@pytest.mark.parametrize("argument, options", WRONG.values(), ids=WRONG.keys())
def test_every_other_argument(argument, options):
    inputs = rows() if "cu_seqlens" in options else make_inputs(2, 5, 2, 8)
    rejection(argument, inputs | options)
