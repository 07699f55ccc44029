"""If no kernel can run, torch's own functions step on the same state."""

import copy

import pytest
import torch

import fastbert
from fastbert import dispatch

from .stepping import assert_bitwise, assert_same, give_gradients, make_params, pair, params_of, run, run_beside_exact


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "device_reason", lambda device, dtype: "switched off by the test")


def on_the_cpu():
    return [torch.nn.Parameter(p.detach().cpu()) for p in make_params()]


@pytest.mark.parametrize(
    "arguments", [{}, {"amsgrad": True, "lr": torch.tensor(0.01)}, {"maximize": True}], ids=["", "amsgrad", "maximize"]
)
def test_is_torchs(arguments, no_kernels, launches):
    ours, theirs = pair(on_the_cpu(), **arguments)
    run(ours, theirs, steps=10, missing=lambda step: {step % 4})
    assert_bitwise(ours, theirs)
    assert not launches()


def test_change_of_place(monkeypatch):
    """Moving from torch's functions to the kernel mid-training keeps the state."""
    ours, theirs = pair()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "device_reason", lambda device, dtype: "switched off by the test")
        run(ours, theirs, steps=5)
    run(ours, theirs, steps=5)
    assert_same(ours, theirs)


def test_scaled(no_kernels):
    ours, theirs = pair(on_the_cpu(), theirs={"fused": True})
    for optimizer in (ours, theirs):
        give_gradients(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
    assert_bitwise(ours, theirs)


def test_bfloat16_in_the_interpreter_and_masters(no_kernels):
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in on_the_cpu()]
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    ours, theirs = fastbert.AdamW(params, master_weights=True), torch.optim.AdamW(exact)
    run_beside_exact(ours, params, theirs, exact, steps=5)
    for param, other in zip(params_of(ours), exact, strict=True):
        assert torch.equal(ours.state[param]["master"], other)
        assert torch.equal(param, other.bfloat16())


def test_one_group_in_two_places():
    """One group with float32 on the kernel and a dtype without a kernel."""
    if torch.cuda.is_available():
        pytest.skip("bfloat16 has a kernel on a GPU")
    params = [*make_params([(20,)]), *make_params([(20,)], torch.bfloat16)]
    ours, theirs = pair(copy.deepcopy(params))
    run(ours, theirs, steps=3)
    assert torch.equal(params_of(ours)[1], params_of(theirs)[1])
    torch.testing.assert_close(params_of(ours)[0], params_of(theirs)[0], rtol=1e-6, atol=1e-6)
