"""Steps captured in several graphs: each replays its own gradients and hyperparameters and leaves nothing behind."""

import gc
import weakref

import pytest
import torch

from fastbert.testing.rows import DEVICE

from .graph import Graph
from .stepping import assert_same, give_gradients, make_params, pair, params_of

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs")


class Captured:
    """A graph of one step of `ours` with its own gradients, and the same step of `theirs`."""

    def __init__(self, ours, theirs, lr, missing, monkeypatch):
        self.ours, self.theirs, self.lr, self.missing = ours, theirs, lr, missing
        give_gradients(ours, missing=missing)
        self.grads = [param.grad for param in params_of(ours)]
        before = [param.clone() for param in params_of(ours)]
        ours.param_groups[0]["lr"] = lr
        self.graph = Graph().capture(ours.step, monkeypatch)
        assert all(torch.equal(param, x) for param, x in zip(params_of(ours), before, strict=True)), "captured, not run"

    def replay(self, number):
        give_gradients(self.theirs, step=number, missing=self.missing)
        for grad, param in zip(self.grads, params_of(self.theirs), strict=True):
            if grad is not None:
                grad.copy_(param.grad)
        self.graph.replay()
        self.theirs.param_groups[0]["lr"] = self.lr
        self.theirs.step()


def stepped_once(arguments, params=None):
    ours, theirs = pair(params, theirs={"capturable": False}, capturable=True, **arguments)
    eager_step(ours, theirs, 0)
    return ours, theirs


def eager_step(ours, theirs, number):
    give_gradients(ours, theirs, step=number)
    theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
    ours.step()
    theirs.step()


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "maximize": True}], ids=["", "amsgrad"])
def test_captures_in_a_row(arguments, monkeypatch):
    """The graphs differ in gradients, rates and parameters; eager steps and later captures do not change a graph."""
    ours, theirs = stepped_once(arguments, [*make_params(), *make_params(dtype=torch.float64)])
    plans = ((1e-2, ()), (3e-3, {1}), (1e-3, {0, 4}), (2e-2, ()))
    graphs = [Captured(ours, theirs, *plan, monkeypatch) for plan in plans]
    for number, which in enumerate((0, 1, 2, 3, 1, 0, None, 3, 2, 0), start=1):
        if which is None:
            eager_step(ours, theirs, number)
        else:
            graphs[which].replay(number)
    assert_same(ours, theirs)


def test_a_tensor_rate_reaches_a_graph(monkeypatch):
    """A learning rate in a device tensor is read at each replay."""
    from fastbert.kernels.adamw import tables as adamw_table

    monkeypatch.setattr(adamw_table, "_on_device", lambda value: isinstance(value, torch.Tensor))
    lr = torch.tensor(1e-2)
    ours, theirs = stepped_once({"lr": lr})
    graph = Captured(ours, theirs, lr, (), monkeypatch)
    for number in range(1, 4):
        lr.mul_(0.5)
        graph.replay(number)
    assert_same(ours, theirs)


def test_a_gradient_laid_out_unlike_its_parameter(monkeypatch):
    ours, theirs = stepped_once({}, make_params([(16, 33)]))
    (param,) = params_of(ours)
    captured = Captured(ours, theirs, 1e-2, (), monkeypatch)
    param.grad = captured.grads[0] = captured.grads[0].t().contiguous().t()
    captured.graph = Graph().capture(ours.step, monkeypatch)
    for number in range(1, 4):
        captured.replay(number)
    assert_same(ours, theirs)


def test_a_dropped_graph_leaves_nothing_behind(monkeypatch):
    ours, theirs = stepped_once({})
    tables = weakref.WeakSet()
    for _ in range(3):
        graph = Captured(ours, theirs, 1e-2, (), monkeypatch).graph
        (arguments,) = graph.launched
        tables |= {arguments["rows_ptr"], arguments["chunks_ptr"], arguments["hyperparameters_ptr"]}
    assert len(tables) == 3, "of the graph that is held"
    del graph, arguments
    gc.collect()
    assert not tables
