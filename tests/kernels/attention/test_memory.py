"""What attention's kernels read and write: nothing outside of their tensors, every element of the outputs, no input."""

import pytest
import torch

from fastbert.kernels.attention import attention, bounds_of
from fastbert.testing.attention import make_inputs, normal, tiles
from fastbert.testing.rows import DEVICE, assert_same, run, seed_tensor

from ..layouts import guarded
from ..test_memory import guards_of, poisoned_outputs
from .test_layouts import every_second, heads_first, shared_heads

pytestmark = pytest.mark.one_in(4)

# Lengths that fill tiles partially, on either side, and head sizes that fill their width partially.
SHAPES = [(1, (1, 1), 1, 1), (2, (19, 19), 2, 24), (1, (17, 33), 1, 16), (2, (33, 5), 1, 59)]
KINDS = ["plain", "causal", "dropped", "key_mask", "bool mask", "added mask", "packed"]


def case(kind, shape, dtype=torch.float32):
    """Inputs, dy and options; tensors among the options are contiguous."""
    batch, lengths, heads, head_size = shape
    inputs, dy = make_inputs(*shape, dtype), normal(batch, lengths[0], heads, head_size, dtype=dtype)
    seen = torch.rand(batch, lengths[1], device=DEVICE) > 0.3
    full = torch.rand(batch, heads, *lengths, device=DEVICE)
    options = {
        "causal": {"causal": True},
        "dropped": {"p": 0.25, "seed": seed_tensor(7)},
        "key_mask": {"key_mask": seen, "key_bounds": bounds_of(seen)},
        "bool mask": {"mask": full > 0.3},
        "added mask": {"mask": full.to(dtype)},
    }.get(kind, {})
    if kind == "packed":  # one sequence of the batch's length, one empty, one with the remaining rows
        rows = batch * lengths[0]
        inputs = {name: normal(rows, heads, head_size, dtype=dtype) for name in inputs}
        dy = dy.flatten(0, 1)
        bounds = torch.tensor([0, lengths[0], lengths[0], rows], dtype=torch.int32, device=DEVICE)
        options = {"cu_seqlens": bounds, "max_seqlen": lengths[0], "p": 0.25, "seed": seed_tensor(7)}
    return inputs, dy, options


def fenced(value, band):
    """A tensor between bands of NaN, or of `band` if its type has no NaN."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return guarded(value)
    storage = value.new_full((value.numel() + 128,), band)
    return storage[64 : 64 + value.numel()].view(value.shape).copy_(value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_stay_inside_the_inputs(kind, shape):
    inputs, dy, options = case(kind, shape)
    with tiles((16, 32), kv=(32, 16)):
        plain = run(attention, inputs, dy, **options)
        for band in (0, 1):
            masks = {name: fenced(value, band) for name, value in options.items()}
            results = run(attention, {name: guarded(x) for name, x in inputs.items()}, guarded(dy), **masks)
            assert_same(results, plain)
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_writes_fill_the_outputs_and_nothing_else(kind, shape, dtype, monkeypatch):
    """Outputs, gradients and the logsumexp are NaN before the call and lie between bands of NaN."""
    inputs, dy, options = case(kind, shape, dtype)
    with tiles((32, 16), kv=(16, 32)):
        plain = run(attention, inputs, dy, **options)
        with poisoned_outputs(monkeypatch) as given:
            results = run(attention, inputs, dy, **options)
    assert_same(results, plain)
    storages = {tensor.untyped_storage().data_ptr() for tensor in given}
    assert {result.untyped_storage().data_ptr() for result in results.values()} <= storages
    assert len(given) >= 3  # out, logsumexp and at least one buffer of gradients
    for tensor in given:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"
        assert not tensor.isnan().any(), f"left unwritten in {tuple(tensor.shape)}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_one_kernel_of_the_backward_leaves_to_the_other_is_written_whole(kind, dtype, monkeypatch):
    inputs, dy, options = case(kind, SHAPES[1], dtype)
    given, band, original = [], -987654321, torch.empty

    def empty(*size, **options):
        tensor = original(*size, **options)
        if tensor.is_floating_point():
            return tensor
        given.append(tensor.new_full((tensor.numel() + 128,), band))
        return given[-1][64:-64].view(tensor.shape)

    monkeypatch.setattr(torch, "empty", empty)
    with tiles((32, 16), kv=(16, 32)):
        run(attention, inputs, dy, **options)
    (numbers,) = given
    assert (numbers[:64] == band).all() and (numbers[-64:] == band).all() and not (numbers[64:-64] == band).any()


@pytest.mark.parametrize("layout", [torch.clone, every_second, heads_first, shared_heads], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_overwritten(kind, layout):
    """Nor are the upstream gradient, masks, seed, bounds and what autograd saved: the second backward agrees."""
    inputs, dy, options = case(kind, (2, (19, 19), 2, 24))
    if kind != "packed":
        inputs, dy = {name: layout(x) for name, x in inputs.items()}, layout(dy)
    read = inputs | {"dy": dy} | {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in read.items()}
    versions = {name: tensor._version for name, tensor in read.items()}

    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = attention(**leaves, **options)
    y_before = y.detach().clone()
    first = torch.autograd.grad(y, tuple(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, tuple(leaves.values()), dy)

    for name, tensor in read.items():
        assert torch.equal(tensor, before[name]) and tensor._version == versions[name], name
    assert torch.equal(y, y_before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind, dtype):
    inputs, dy, options = case(kind, (2, (33, 33), 1, 16), dtype)
    with tiles((16, 16)):
        first = run(attention, inputs, dy, **options)
        second = run(attention, inputs, dy, **options)
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_share_no_memory_with_inputs(kind, shape):
    inputs, dy, options = case(kind, shape)
    results = run(attention, inputs, dy, **options)
    read = (*inputs.values(), dy, *(value for value in options.values() if isinstance(value, torch.Tensor)))
    taken = {t.untyped_storage().data_ptr() for t in read}
    assert not taken & {t.untyped_storage().data_ptr() for t in results.values()}
    gradients = [results[name] for name in ("dq", "dk", "dv")]
    assert results["y"].untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in gradients}


def test_gradients_in_one_buffer_do_not_overlap():
    """They may be views of one product's gradient: each is written without a trace in the others."""
    inputs, dy, _ = case("plain", SHAPES[1])
    dq, dk, dv = (run(attention, inputs, dy)[name] for name in ("dq", "dk", "dv"))
    others = dk.clone(), dv.clone()
    dq.fill_(torch.nan)
    assert torch.equal(dk, others[0]) and torch.equal(dv, others[1])
