"""Optimizer tests that need a GPU: bfloat16, CUDA graphs, synchronisation, races between programs, time."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.amp import GradScaler

import fastbert
from fastbert.testing.rows import DEVICE

from .stepping import assert_bitwise, assert_same, give_gradients, make_params, pair, params_of, run

pytestmark = pytest.mark.gpu

LARGE = [(1000, 768), (768,), (3072, 769), (2,), ()]


@contextmanager
def no_synchronisation():
    """Within it, torch raises if the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_programs(launches):
    ours, theirs = pair(make_params(LARGE), lr=1e-2, weight_decay=0.1, amsgrad=True)
    run(ours, theirs, steps=20)
    assert_same(ours, theirs)
    assert launches() == {"adamw_kernel": 20}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_is_torchs_fused(dtype):
    """Both compute in the same precision, so nearly all elements are bitwise equal and the others one rounding apart."""
    ours, theirs = pair(make_params(LARGE, dtype), theirs={"fused": True}, lr=1e-2, eps=1e-4)
    run(ours, theirs, steps=1)
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(param, other, rtol=2 * eps, atol=2 * eps)
        if param.numel() > 1000:
            assert float((param == other).float().mean()) > 0.98
    run(ours, theirs, steps=20)
    assert_same(ours, theirs, tolerance=32 * torch.finfo(dtype).eps)


def test_bfloat16_masters_follow_float32():
    """Measured from float64, the error is at most twice that of torch's fused AdamW on float32 parameters."""
    params = make_params(LARGE, torch.bfloat16)
    single, double = ([torch.nn.Parameter(p.detach().to(dtype)) for p in params] for dtype in (torch.float32, torch.float64))
    ours = fastbert.AdamW(params, lr=1e-4, master_weights=True)
    theirs, exact = torch.optim.AdamW(single, lr=1e-4, fused=True), torch.optim.AdamW(double, lr=1e-4)
    for step in range(50):
        give_gradients(ours, step=step)
        for param, *others in zip(params, single, double, strict=True):
            for other in others:
                other.grad = param.grad.to(other.dtype)
        for optimizer in (ours, theirs, exact):
            optimizer.step()
    for param, other, reference in zip(params, single, double, strict=True):
        master = ours.state[param]["master"]
        bound = 2 * (other - reference).abs().max() + torch.finfo(torch.float32).eps * reference.abs().max()
        assert (master - reference).abs().max() <= bound
        assert torch.equal(param.detach(), master.bfloat16())


def test_runs_repeat_bitwise():
    one, _ = pair(make_params(LARGE))
    other = copy.deepcopy(one)
    for step in range(10):
        give_gradients(one, other, step=step)
        one.step()
        other.step()
    assert_bitwise(one, other)


def test_no_synchronisation():
    lr = torch.tensor(1e-3, device=DEVICE)
    ours = fastbert.AdamW(make_params(LARGE), lr=lr)
    give_gradients(ours)
    ours.step()
    scale, found = torch.tensor(2.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    with no_synchronisation():
        for step in range(5):
            for param in params_of(ours):
                param.grad = param.grad * 0.5  # moves
            lr.mul_(0.9)
            ours.param_groups[0]["weight_decay"] = 0.01 * step
            ours.grad_scale, ours.found_inf = scale, found
            ours.step()


def test_grad_scaler_with_forced_infinities_does_not_synchronise():
    ours, theirs = pair(make_params(LARGE), theirs={"fused": True}, lr=1e-2)
    scalers = [GradScaler("cuda", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            scaler.scale(torch.ones((), device=DEVICE))
            give_gradients(optimizer, step=step, scale=float(scaler.get_scale()))
            if step in (0, 3, 4):
                params_of(optimizer)[0].grad[5, 5] = torch.inf
            if optimizer is ours and step:
                with no_synchronisation():
                    scaler.step(optimizer)
                    scaler.update()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert {float(ours.state[p]["step"]) for p in params_of(ours)} == {5.0}
    assert_same(ours, theirs)


@pytest.mark.parametrize("static", [True, False], ids=["static gradients", "gradients of the graph"])
def test_captured_in_a_graph(static):
    """A whole step with forward and backward is replayed; an eager step between replays does not change it."""
    lr = torch.tensor(1e-2, device=DEVICE)
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 33).to(DEVICE)
    other = copy.deepcopy(model)
    ours = fastbert.AdamW(model.parameters(), lr=lr, capturable=True)
    theirs = torch.optim.AdamW(other.parameters(), lr=lr, capturable=True)
    x = torch.randn(8, 64, device=DEVICE)

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=not static)
        (model(x) ** 2).mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, ours)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if not static:
        ours.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(model, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # capturable and not captured
        for _ in range(3):
            step(other, theirs)
        for number in range(6):
            x.copy_(torch.randn(8, 64, device=DEVICE))
            lr.mul_(0.9)
            step(other, theirs)
            if number == 3:
                step(model, ours)
            else:
                graph.replay()
    assert_same(ours, theirs)


def test_captures_in_a_row(monkeypatch):
    """Each graph keeps its gradients and numbers. A capture pins no memory, which not every torch supports."""
    ours, theirs = pair(make_params(LARGE), theirs={"fused": True}, lr=1e-2, capturable=True)
    run(ours, theirs, steps=1)
    pin_memory = torch.Tensor.pin_memory

    def pinned(*arguments, **keywords):
        assert not torch.cuda.is_current_stream_capturing(), "memory is pinned inside a capture"
        return pin_memory(*arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    graphs = []
    for missing in ((), {1}, {0, 3}, ()):
        give_gradients(ours, missing=missing)
        graph, grads = torch.cuda.CUDAGraph(), [param.grad for param in params_of(ours)]
        with torch.cuda.graph(graph):
            ours.step()
        graphs.append((graph, grads, missing))
    for step, which in enumerate((0, 1, 2, 3, 1, None, 0, 2, 3), start=1):
        graph, grads, missing = graphs[which] if which is not None else (None, None, ())
        give_gradients(theirs, step=step, missing=missing)
        if graph is None:
            give_gradients(ours, step=step)
            ours.step()
        else:
            for grad, param in zip(grads, params_of(theirs), strict=True):
                if grad is not None and param.grad is not None:
                    grad.copy_(param.grad)
            graph.replay()
        theirs.step()
    assert_same(ours, theirs)


def test_a_graph_needs_capturable_and_state():
    ours, _ = pair(make_params([(40,)]))
    give_gradients(ours)
    for message in ("capturable: expected True", "step: an optimizer without state cannot be captured"):
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            ours.step()
        ours.param_groups[0]["capturable"] = True


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_devices(launches):
    params = make_params()
    params += [torch.nn.Parameter(p.detach().to("cuda:1")) for p in params]
    ours, theirs = pair(params)
    run(ours, theirs, steps=5)
    assert_same(ours, theirs)
    assert launches() == {"adamw_kernel": 10}


def milliseconds(optimizer, steps=20):
    for _ in range(5):
        optimizer.step()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        optimizer.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


def test_not_slower_than_torchs_fused():
    """A sanity bound with BERT-large's parameters in float32; benchmarks measure the exact time."""
    layer = [(1024, 1024), (1024,)] * 4 + [(4096, 1024), (4096,), (1024, 4096), (1024,)] + [(1024,)] * 4
    params = make_params([(30522, 1024), (512, 1024), *layer * 24])
    ours, theirs = pair(params, theirs={"fused": True})
    give_gradients(ours)
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        other.grad = param.grad
    assert milliseconds(ours) < 1.2 * milliseconds(theirs)
