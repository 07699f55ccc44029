"""Memory that runs out in the middle: the step can be repeated, and what the failed attempt held is released at once."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fastbert
from fastbert.kernels.adamw.tables import Upload
from fastbert.kernels.core import failures
from fastbert.testing.rows import DEVICE
from tests.optim.stepping import assert_same, give_gradients, make_params, pair, params_of, run

from .broken import break_kernels
from .cases import cases


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True}, {"master_weights": True}], ids=["", "amsgrad", "masters"])
@pytest.mark.parametrize("made", [0, 1, 2])
def test_a_parameters_state_is_created_whole_or_not_at_all(made, arguments, monkeypatch):
    dtype = torch.float16 if "master_weights" in arguments else torch.float32
    optimizer = fastbert.AdamW(make_params(dtype=dtype), **arguments)
    give_gradients(optimizer)
    before = [param.detach().clone() for param in params_of(optimizer)]
    zeros, calls = torch.zeros_like, []

    def some(*given, **keywords):
        calls.append(given)
        return zeros(*given, **keywords) if len(calls) <= made else out_of_memory()

    with monkeypatch.context() as short, pytest.raises(torch.OutOfMemoryError):
        short.setattr(torch, "zeros_like", some)
        optimizer.step()
    assert all(map(torch.equal, params_of(optimizer), before))
    optimizer.step()
    assert all(float(optimizer.state[param]["step"]) == 1.0 for param in params_of(optimizer))
    assert not any(map(torch.equal, params_of(optimizer), before))


def test_nothing_is_stepped_before_all_state_exists(monkeypatch):
    """bfloat16 is stepped by torch in the interpreter, before the kernel steps the others."""
    first, second = nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device="cpu")), nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = fastbert.AdamW([{"params": [first]}, {"params": [second]}])
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    create = fastbert.optim._create_state
    with monkeypatch.context() as short, pytest.raises(torch.OutOfMemoryError):
        short.setattr(
            fastbert.optim,
            "_create_state",
            lambda state, param, *rest: create(state, param, *rest) if param is first else out_of_memory(),
        )
        optimizer.step()
    assert torch.equal(first, torch.ones_like(first))
    optimizer.step()
    assert float(optimizer.state[first]["step"]) == float(optimizer.state[second]["step"]) == 1.0


@pytest.mark.parametrize("what", ["pointers", "numbers"])
def test_tables_that_were_sent_in_part_are_sent_again(what, monkeypatch):
    """float32 and float16 have a table each; the second one's upload fails, and then everything is as it was before."""
    ours, theirs = pair([*make_params(), *make_params(dtype=torch.float16)], theirs={"fused": True})
    run(ours, theirs, steps=1)
    send, sent = Upload.send, []

    def first_only(self, host):
        sent.append(host)
        return send(self, host) if len(sent) == 1 else out_of_memory()

    former = [param.grad for param in params_of(ours)]
    with monkeypatch.context() as short:
        short.setattr(Upload, "send", first_only)
        if what == "pointers":
            for param in params_of(ours):
                param.grad = param.grad.clone()
        else:
            ours.param_groups[0]["lr"] = 0.5
        with pytest.raises(torch.OutOfMemoryError):
            ours.step()
    for param, grad in zip(params_of(ours), former, strict=True):
        param.grad = grad
    ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"]
    for param in params_of(ours):
        param.grad.fill_(0.5)
    for param in params_of(theirs):
        param.grad.fill_(0.5)
    ours.step()
    theirs.step()
    assert_same(ours, theirs, tolerance=1e-3)


def test_the_error_holds_no_tensor_of_the_launch(monkeypatch):
    """Without a cycle that only the garbage collector finds, so that the next attempt has the memory."""
    case = cases()["bias_gelu gelu"]
    x = torch.randn(5, 24, device=DEVICE)
    break_kernels(monkeypatch, case.forward, lambda: torch.OutOfMemoryError("CUDA out of memory."))
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            case.call(x, case.inputs["bias"].detach())
        held = weakref.ref(x)
        del x, caught
        assert held() is None
    finally:
        gc.enable()
    assert not failures.reasons
