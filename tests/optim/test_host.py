"""Host cost of a step: ATen calls, launches and Python calls; and a quick step notices every change."""

import sys
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.kernels import adamw as kernels
from fastbert.testing.rows import DEVICE

from .stepping import assert_same, give_gradients, make_params, pair, params_of, run

on_the_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason="the exact calls are those of tables on the CPU")


class Calls(TorchDispatchMode):
    """Counts ATen calls by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Records launches without running them, because the interpreter would make tensors and call functions."""
    found = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *arguments, **keywords: found.append(kernel.__name__))
    return found


def stepped(params=None, **arguments):
    """An optimizer after some steps, whose next step repeats the last one."""
    ours = fastbert.AdamW(make_params() if params is None else params, **arguments)
    give_gradients(ours)
    for _ in range(3):
        ours.step()
    return ours


@pytest.mark.parametrize("arguments", [{}, {"amsgrad": True, "maximize": True}], ids=["", "amsgrad"])
def test_a_step_is_one_launch_and_nothing_else(arguments, launched):
    ours = stepped(**arguments)
    launched.clear()
    with Calls() as calls:
        ours.step()
    assert launched == ["adamw_kernel"]
    assert calls.names == []


@on_the_cpu
def test_what_changes_is_uploaded(launched):
    ours = stepped()
    grads = [param.grad.clone() for param in params_of(ours)]
    for param, grad in zip(params_of(ours), grads, strict=True):
        param.grad = grad
    with Calls() as moved:
        ours.step()
    ours.param_groups[0]["lr"] = 0.5
    with Calls() as rate:
        ours.step()
    assert moved.names == ["select", "copy_", "copy_"], "one column of the table, and the table"
    assert rate.names == ["lift_fresh", "view", "copy_"]
    assert (ours._tables.built, ours._tables.uploaded) == (1, 2)


def python_calls(function):
    found = []
    sys.setprofile(lambda frame, event, argument: found.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(found)


def test_no_python_function_runs_for_each_parameter(launched):
    few, many = (stepped(make_params([(3,)] * n)) for n in (10, 100))
    assert python_calls(few.step) == python_calls(many.step) < 100
    for optimizer in (few, many):
        order_states_anew(optimizer, params_of(optimizer)[0])
    assert python_calls(few.step) < 100 and python_calls(many.step) < 300, "a hash for each parameter, and no more"


def test_parameters_without_gradient_are_passed_over_quickly(launches):
    ours, theirs = pair(make_params([(3,), (4,), (5,)]))
    run(ours, theirs, steps=6, missing=lambda step: {1} if step else ())
    assert (ours._tables.built, launches()) == (2, {"adamw_kernel": 6})
    assert_same(ours, theirs)


def replace_a_moment(optimizer, param):
    optimizer.state[param]["exp_avg"] = torch.ones_like(param)


def move_a_moment(optimizer, param):
    optimizer.state[param]["exp_avg_sq"].data = torch.full_like(param, 2.0)


def replace_the_state(optimizer, param):
    optimizer.state[param] = {name: tensor * 2 for name, tensor in optimizer.state[param].items()}


def exchange_states(optimizer, param):
    """Exchange the states of two parameters of the same shape."""
    other = params_of(optimizer)[1]
    optimizer.state[param], optimizer.state[other] = optimizer.state[other], optimizer.state[param]


def order_states_anew(optimizer, param):
    state = optimizer.state.pop(param)
    optimizer.state[param] = state


def reset_a_step(optimizer, param):
    optimizer.state[param]["step"] = torch.zeros_like(optimizer.state[param]["step"])


def remove_a_state(optimizer, param):
    del optimizer.state[param]


def clear_states(optimizer, param):
    optimizer.state.clear()


def put_in_another(optimizer, param):
    new = torch.nn.Parameter(torch.ones_like(param))
    new.grad = torch.ones_like(param)
    optimizer.param_groups[0]["params"][0] = new


def move_to_another_group(optimizer, param):
    param = params_of(optimizer)[-1]  # so that the order stays
    optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [param], "lr": 1e-3})


CHANGES = (
    *(replace_a_moment, move_a_moment, replace_the_state, exchange_states, order_states_anew, reset_a_step, remove_a_state),
    *(clear_states, put_in_another, move_to_another_group),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_by_hand_is_noticed(change):
    ours, theirs = pair(make_params([(6,), (6,), (2, 3)]), lr=1e-2)
    run(ours, theirs, steps=3)
    for optimizer in (ours, theirs):
        change(optimizer, params_of(optimizer)[0])
    run(ours, theirs, steps=2)
    assert_same(ours, theirs)


def test_a_sparse_gradient_after_some_steps():
    ours = stepped()
    param = params_of(ours)[0]
    before, param.grad = param.clone(), torch.ones_like(param).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        ours.step()
    assert torch.equal(param, before)
    give_gradients(ours)
    ours.step()


def test_masters_requested_midway():
    ours = stepped(make_params(dtype=torch.float16))
    ours.param_groups[0]["master_weights"] = True
    ours.step()
    assert all(state["master"].dtype == torch.float32 for state in ours.state.values())


def test_a_master_that_is_there_is_the_one_that_steps():
    ours = stepped(make_params(dtype=torch.float16), master_weights=True)
    ours.param_groups[0]["master_weights"] = False
    for _ in range(2):
        ours.step()
    for param, state in ours.state.items():
        assert torch.equal(param.detach(), state["master"].half()) and float(state["step"]) == 5.0


def test_a_gradient_of_another_dtype_in_the_same_memory():
    ours, theirs = pair(make_params([(8,), (8,)]))
    run(ours, theirs, steps=3)
    grad = params_of(ours)[0].grad
    halves = grad.half()
    grad.data = grad.new_empty(0, dtype=torch.float16).set_(grad.untyped_storage(), 0, grad.shape, grad.stride())
    grad.copy_(halves)
    params_of(theirs)[0].grad = halves.float()
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)


def test_tables_keep_nothing_of_the_state_alive():
    """`optimizer.state.clear()` must free the memory of the state."""
    ours = stepped()
    moment = weakref.ref(ours.state[params_of(ours)[0]]["exp_avg"])
    ours.state.clear()
    assert moment() is None
