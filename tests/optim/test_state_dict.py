"""Checkpoints exchanged with torch.optim.AdamW mid-training, float32 masters, and the devices of state."""

import copy
import io

import pytest
import torch

import fastbert
from fastbert.testing.rows import DEVICE

from .stepping import assert_bitwise, assert_same, give_gradients, make_params, pair, params_of, run


def saved(optimizer):
    """The state_dict after saving and loading it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
def test_exchanged_both_ways(amsgrad):
    ours, theirs = pair(lr=1e-2, weight_decay=0.1, amsgrad=amsgrad)
    run(ours, theirs, steps=4)

    mine = fastbert.AdamW(copy.deepcopy(params_of(theirs)), lr=9.0)
    mine.load_state_dict(saved(theirs))
    assert_bitwise(mine, theirs)
    other = torch.optim.AdamW(copy.deepcopy(params_of(ours)), lr=9.0)
    other.load_state_dict(saved(ours))
    assert_bitwise(ours, other)

    run(mine, theirs, steps=4)
    run(ours, other, steps=4)
    for a, b in ((mine, theirs), (ours, other), (ours, theirs)):
        assert_same(a, b)


def test_same_layout_as_torchs():
    ours, theirs = pair()
    run(ours, theirs, steps=2)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and a["state"].keys() == b["state"].keys()
    for index, state in b["state"].items():
        assert a["state"][index].keys() == state.keys()
        for name, tensor in state.items():
            mine = a["state"][index][name]
            assert (mine.dtype, mine.shape, mine.device) == (tensor.dtype, tensor.shape, tensor.device), name
    assert a["param_groups"][0].keys() == b["param_groups"][0].keys()


def test_resuming_is_as_if_never_stopped():
    ours, _ = pair(lr=1e-2)
    for step in range(3):
        give_gradients(ours, step=step)
        ours.step()
    resumed = fastbert.AdamW(copy.deepcopy(params_of(ours)))
    resumed.load_state_dict(saved(ours))
    run(ours, resumed, steps=3, first=3)
    assert_bitwise(ours, resumed)


def test_step_saved_as_a_number():
    """As torch did before 1.12."""
    ours, theirs = pair()
    run(ours, theirs, steps=2)
    old = copy.deepcopy(theirs.state_dict())
    old["state"] = {i: state | {"step": int(state["step"])} for i, state in old["state"].items()}
    ours.load_state_dict(old)
    run(ours, theirs, steps=2)
    assert_same(ours, theirs)


def masters(dtype=torch.float16, **arguments):
    """fastbert with float32 masters of 16-bit parameters, and torch on float32 parameters equal to the masters."""
    params = make_params(dtype=dtype)
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    return fastbert.AdamW(params, master_weights=True, **arguments), torch.optim.AdamW(exact, **arguments)


def step_both(ours, theirs, steps):
    for step in range(steps):
        give_gradients(ours, step=step)
        for param, other in zip(params_of(ours), params_of(theirs), strict=True):
            other.grad = param.grad.float()
        ours.step()
        theirs.step()


def assert_masters(ours, theirs):
    for param, other in zip(params_of(ours), params_of(theirs), strict=True):
        state = ours.state[param]
        torch.testing.assert_close(state["master"], other.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(param.detach(), state["master"].to(param.dtype))
        assert {state[name].dtype for name in state} == {torch.float32}
        torch.testing.assert_close(state["exp_avg_sq"], theirs.state[other]["exp_avg_sq"], rtol=1e-6, atol=1e-6)


def test_master_weights(launches):
    ours, theirs = masters(lr=1e-4, weight_decay=0.1)
    step_both(ours, theirs, 50)
    assert launches() == {"adamw_kernel": 50}
    assert_masters(ours, theirs)


def test_master_weights_in_a_checkpoint():
    ours, theirs = masters(lr=1e-4)
    step_both(ours, theirs, 3)
    resumed = fastbert.AdamW(copy.deepcopy(params_of(ours)), master_weights=True)
    resumed.load_state_dict(saved(ours))
    assert_bitwise(ours, resumed)
    step_both(resumed, theirs, 3)
    assert_masters(resumed, theirs)


def test_master_weights_from_torchs_checkpoint():
    _, theirs = pair(make_params(dtype=torch.float16))
    give_gradients(theirs)
    theirs.step()
    ours = fastbert.AdamW(copy.deepcopy(params_of(theirs)), master_weights=True)
    ours.load_state_dict(saved(theirs))
    give_gradients(ours, step=1)
    ours.step()
    for param in params_of(ours):
        assert {tensor.dtype for tensor in ours.state[param].values()} == {torch.float32}
        assert torch.equal(param.detach(), ours.state[param]["master"].half())


def test_a_master_follows_a_parameter_that_was_written_since():
    """As when an optimizer's checkpoint is loaded whose masters are not those of the model's."""
    ours, _ = masters(lr=1e-2)
    give_gradients(ours)
    ours.step()
    loaded = [copy.deepcopy(ours), copy.deepcopy(ours)]
    for each in loaded:
        each.load_state_dict(saved(ours))
    with torch.no_grad():
        for param in params_of(loaded[1]):
            param.view(-1)[::2] += 1.0
    for each in loaded:
        give_gradients(each, step=1)
        each.step()
    for mine, other in zip(*map(params_of, loaded), strict=True):
        moved = (loaded[1].state[other]["master"] - loaded[0].state[mine]["master"]).view(-1)
        assert (moved[::2] - 1.0).abs().max() < 0.01
        assert not moved[1::2].any()
        assert torch.equal(other.detach(), loaded[1].state[other]["master"].half())


def test_float32_parameters_have_no_master():
    ours = fastbert.AdamW(make_params(), master_weights=True)
    give_gradients(ours)
    ours.step()
    assert all("master" not in state for state in ours.state.values())


@pytest.mark.gpu
def test_steps_are_saved_on_the_cpu():
    ours, _ = pair()
    give_gradients(ours)
    ours.step()
    assert all(state["step"].device == DEVICE or state["step"].is_cuda for state in ours.state.values())
    assert all(state["step"].device.type == "cpu" for state in ours.state_dict()["state"].values())
    assert all(state["step"].is_cuda for state in ours.state.values())
