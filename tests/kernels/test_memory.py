"""What the kernels read and write: nothing outside of their tensors, every element of the outputs, no input."""

from contextlib import contextmanager

import pytest
import torch

from fastbert.testing.rows import DEVICE, DROPOUT_ADD_LAYERNORM, OPS, assert_same, make_inputs, run, seed_tensor

from .layouts import expanded, guarded, sliced

SHAPES = [(1, 1), (1, 37), (5, 48), (33, 37), (65, 100), (2, 1023), (3, 1500)]
DTYPES = [torch.float32, torch.float16]


def options_of(op):
    return {"p": 0.25, "seed": seed_tensor(7)} if op is DROPOUT_ADD_LAYERNORM else {}


@contextmanager
def poisoned_outputs(monkeypatch):
    """torch.empty and its kin return NaN between bands of NaN; yields the list of returned tensors."""
    given = []

    def poison(original):
        def allocate(*args, **kwargs):
            tensor = original(*args, **kwargs)
            if not tensor.is_floating_point() or not tensor.numel():
                return tensor
            inner = guarded(torch.full_like(tensor, torch.nan))
            given.append(inner)
            return inner

        return allocate

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison(torch.empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        yield given


def guards_of(tensor):
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    return torch.cat([whole[:start], whole[start + tensor.numel() :]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_reads_stay_inside_the_inputs(op, dtype, shape):
    inputs, dy = make_inputs(op, shape, dtype), torch.randn(shape).to(DEVICE, dtype)
    plain = run(op.call, inputs, dy)
    fenced = run(op.call, {k: guarded(t) for k, t in inputs.items()}, guarded(dy))
    assert_same(fenced, plain)
    assert all(t.isfinite().all() for t in fenced.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_writes_fill_the_outputs_and_nothing_else(op, dtype, shape, monkeypatch):
    inputs, dy = make_inputs(op, shape, dtype), torch.randn(shape).to(DEVICE, dtype)
    plain = run(op.call, inputs, dy, **options_of(op))
    with poisoned_outputs(monkeypatch) as given:
        results = run(op.call, inputs, dy, **options_of(op))
    assert_same(results, plain)
    assert {results["y"].data_ptr(), results["dx"].data_ptr()} <= {tensor.data_ptr() for tensor in given}
    assert all(t.isfinite().all() for t in results.values())  # NaN where a kernel left an element out
    for tensor in given:
        assert guards_of(tensor).isnan().all(), f"written outside of {tuple(tensor.shape)}"


@pytest.mark.parametrize("layout", [lambda t: t.clone(), sliced, expanded], ids=["contiguous", "sliced", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_inputs_are_not_overwritten(op, dtype, layout):
    """Nor are the upstream gradient (Liger's kernels reuse it), the seed and what autograd saved."""
    inputs, options = make_inputs(op, (33, 40), dtype), options_of(op)
    inputs = {name: layout(t) if name in op.rows else t for name, t in inputs.items()}
    dy = layout(torch.randn(33, 40).to(DEVICE, dtype))
    read = inputs | {"dy": dy} | ({"seed": options["seed"]} if options else {})
    before = {name: tensor.clone() for name, tensor in read.items()}

    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = op.call(**leaves, **options)
    y_before = y.detach().clone()
    first = torch.autograd.grad(y, tuple(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, tuple(leaves.values()), dy)

    for name, tensor in read.items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(y, y_before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_same_bits_every_time(op, dtype):
    inputs, dy = make_inputs(op, (97, 72), dtype), torch.randn(97, 72).to(DEVICE, dtype)
    first = run(op.call, inputs, dy, **options_of(op))
    second = run(op.call, inputs, dy, **options_of(op))
    assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_outputs_share_no_memory_with_inputs(op):
    inputs, dy = make_inputs(op, (5, 48)), torch.randn(5, 48, device=DEVICE)
    results = run(op.call, inputs, dy, **options_of(op))
    taken = {t.untyped_storage().data_ptr() for t in (*inputs.values(), dy)}
    assert not taken & {t.untyped_storage().data_ptr() for t in results.values()}
