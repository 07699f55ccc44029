"""AdamW whose kernel fails: torch's own functions step the parameters that the kernel has not updated."""

import logging

import pytest
import torch

from fastbert.kernels.core import failures
from tests.optim.stepping import assert_same, give_gradients, make_params, pair, params_of, run

from .broken import break_kernels

KERNEL = "adamw_kernel"


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "maximize": True}], ids=["", "amsgrad"])
def test_is_torchs(arguments, monkeypatch, caplog, launches):
    (broken,) = break_kernels(monkeypatch, [KERNEL]).values()
    ours, theirs = pair(**arguments)
    with caplog.at_level(logging.WARNING, "fastbert"):
        run(ours, theirs, steps=4)
    assert_same(ours, theirs)
    (record,) = caplog.records
    assert KERNEL in record.message and broken.attempts == 1 and not launches()


def test_goes_on_where_the_kernel_worked(monkeypatch, launches):
    ours, theirs = pair()
    broken = break_kernels(monkeypatch, [KERNEL], good=2)
    run(ours, theirs, steps=4)
    assert_same(ours, theirs)
    assert launches() == {KERNEL: 2} and broken[KERNEL].attempts == 1


def test_no_parameter_steps_twice(monkeypatch, launches):
    """float32 and float64 take one launch each, and the second one fails."""
    ours, theirs = pair([*make_params(), *make_params(dtype=torch.float64)])
    broken = break_kernels(monkeypatch, [KERNEL], good=1)
    run(ours, theirs, steps=1)
    assert launches() == {KERNEL: 1} and broken[KERNEL].attempts == 1
    assert all(float(ours.state[param]["step"]) == 1.0 for param in params_of(ours))
    assert_same(ours, theirs)


def test_scaled_gradients(monkeypatch):
    break_kernels(monkeypatch, [KERNEL])
    ours, theirs = pair(theirs={"fused": True})
    for optimizer in (ours, theirs):
        give_gradients(optimizer)
        optimizer.grad_scale = torch.tensor(4.0, device=params_of(optimizer)[0].device)
        for found in (0.0, 1.0):
            optimizer.found_inf = torch.tensor(found, device=optimizer.grad_scale.device)
            optimizer.step()
    assert_same(ours, theirs)
    assert KERNEL in failures.reasons


def test_a_captured_step_that_fails_is_raised(monkeypatch, launches):
    """Later steps use the kernel."""
    ours, theirs = pair()
    run(ours, theirs, steps=1)
    with monkeypatch.context() as capturing:
        error = RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
        break_kernels(capturing, [KERNEL], lambda: error)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        before = {param: param.clone() for param in params_of(ours)}
        with pytest.raises(RuntimeError, match="stream is capturing"):
            ours.step()
    assert KERNEL in error.__notes__[0] and not failures.reasons
    assert all(torch.equal(param, value) for param, value in before.items())
    run(ours, theirs, steps=2)
    assert_same(ours, theirs)
    assert launches() == {KERNEL: 3}
