"""attention on a GPU: 16-bit types at BERT's shapes, packed rows, layouts, compiled dropout, reads within bounds."""

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.testing.attention import check, drawn_keep, make_inputs, normal
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor
from tests.gpu import captured

from ..cases import dtype_name
from ..layouts import guarded
from .test_layouts import every_second, head_size_first, heads_first, shared_heads
from .test_memory import KINDS, SHAPES, case, fenced

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HALVES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_name)


def lengths_of(batch, length):
    """From the full length down to a sixteenth of it; only the first is a multiple of a tile."""
    return torch.tensor([max(2, length - 37 * i * length // 128) for i in range(batch)], device=DEVICE).clamp(length // 16 + 1)


def options_of(kind, batch, length):
    key_mask = torch.arange(length, device=DEVICE) < lengths_of(batch, length)[:, None]
    full = torch.rand(batch, 1, length, length, device=DEVICE) > 0.1
    full[..., 0] = True
    return {
        "plain": {},
        "causal": {"causal": True},
        "dropped": {"p": 0.1, "seed": seed_tensor(7)},
        "key_mask": {"key_mask": key_mask},
        "bool mask": {"mask": full},
        "added mask": {"mask": torch.zeros(full.shape, device=DEVICE).masked_fill(~full, torch.finfo(FP32).min)},
        "everything": {"key_mask": key_mask, "mask": full, "causal": True, "p": 0.1, "seed": seed_tensor(7)},
    }[kind]


@HALVES
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("kind", ["plain", "causal", "dropped", "key_mask", "bool mask", "added mask", "everything"])
def test_bound_at_berts_shapes(kind, length, head_size, dtype):
    check(make_inputs(4, length, 12, head_size, dtype), **options_of(kind, 4, length))


@HALVES
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("option", ["plain", "causal", "dropped"])
def test_bound_of_packed_rows(option, head_size, dtype):
    lengths = [512, 0, 1, 128, 37, 300, 2]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    inputs = {name: normal(sum(lengths), 12, head_size, dtype=dtype) for name in ("q", "k", "v")}
    check(inputs, cu_seqlens=bounds, max_seqlen=512, causal=option == "causal", p=0.1 * (option == "dropped"))


@HALVES
@pytest.mark.parametrize("lengths", [(1, 512), (129, 65), (65, 129), (512, 77)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_bound_of_lengths_that_differ(causal, lengths, dtype):
    check(make_inputs(2, lengths, 3, 64, dtype), causal=causal)


@HALVES
@pytest.mark.parametrize("head_size", [40, 64, 128])
@pytest.mark.parametrize("heads", [(12, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "dropped", "key_mask", "bool mask", "everything"])
def test_bound_of_grouped_heads(kind, heads, head_size, dtype):
    inputs = make_inputs(2, 257, heads[0], head_size, dtype)
    inputs |= {name: normal(2, 257, heads[1], head_size, dtype=dtype) for name in "kv"}
    check(inputs, **options_of(kind, 2, 257))


@HALVES
@pytest.mark.parametrize("head_size", [8, 24, 40, 56, 72])
def test_bound_of_head_sizes_that_8_divides(head_size, dtype):
    """Views of one product whose rows and heads start at multiples of 16 bytes, and views that start anywhere."""
    product = normal(2, 129, 3, 3, head_size + 1, dtype=dtype)
    check(dict(zip("qkv", product[..., :-1].contiguous().unbind(2), strict=True)), p=0.1)
    check(dict(zip("qkv", product[..., :-1].unbind(2), strict=True)), p=0.1)
    check(dict(zip("qkv", product[..., 1:].unbind(2), strict=True)), product[:, :, 0, :, 1:], p=0.1)


@HALVES
@pytest.mark.parametrize("layout", [heads_first, head_size_first, every_second, shared_heads], ids=lambda f: f.__name__)
def test_bound_of_layouts(layout, dtype):
    inputs = {name: layout(x) for name, x in make_inputs(2, 129, 3, 64, dtype).items()}
    check(inputs, layout(normal(2, 129, 3, 64, dtype=dtype)), p=0.1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=dtype_name)
def test_the_compiled_mask_is_the_same_in_every_kernel(dtype):
    """With scores of 0, one-hot values and one-hot dy, out is the forward's mask [query, key] and dv the backward's."""
    one_hot = torch.eye(256, device=DEVICE, dtype=dtype)[None, :, None].expand(2, -1, 3, -1)
    inputs = {"q": torch.zeros_like(one_hot), "k": torch.zeros_like(one_hot), "v": one_hot}
    results = run(attention, inputs, one_hot, p=0.3, seed=seed_tensor(5))
    keep = drawn_keep(2, 3, 256, 256, 0.3, seed_tensor(5))
    assert torch.equal(results["y"].transpose(1, 2) > 0, keep)
    assert torch.equal(results["dv"].permute(0, 2, 3, 1) > 0, keep)


@HALVES
@pytest.mark.parametrize("shape", [*SHAPES, (2, (130, 70), 2, 64)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_stay_inside_the_inputs(kind, shape, dtype):
    inputs, dy, options = case(kind, shape, dtype)
    plain = run(attention, inputs, dy, **options)
    for band in (0, 1):
        masks = {name: fenced(value, band) for name, value in options.items()}
        results = run(attention, {name: guarded(x) for name, x in inputs.items()}, guarded(dy), **masks)
        assert_same(results, plain)
        assert all(t.isfinite().all() for t in results.values())


def test_each_replay_of_a_cuda_graph_draws_its_own_dropout():
    """Its backward draws the same one: dv is the dropped weights, transposed, as out is (see above)."""
    one_hot = torch.eye(128, device=DEVICE, dtype=BF16)[None, :, None].expand(1, -1, 4, -1)
    inputs = {"q": torch.zeros_like(one_hot), "k": torch.zeros_like(one_hot), "v": one_hot}
    replay, results = captured(lambda: run(attention, inputs, one_hot, p=0.5))
    masks = []
    for _ in range(4):
        replay()
        masks.append(results["y"] > 0)
        assert torch.equal(results["dv"].transpose(1, 3) > 0, masks[-1])
    for i, one in enumerate(masks):
        assert 0.45 < float(one.float().mean()) < 0.55
        assert not any(torch.equal(one, other) for other in masks[:i])
