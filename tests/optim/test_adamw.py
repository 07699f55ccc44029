"""fastbert.AdamW against torch.optim.AdamW: every configuration of torch's own tests, 100 steps, all state."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastbert
from fastbert.testing.rows import DEVICE

from .stepping import assert_bitwise, assert_same, give_gradients, make_params, pair, params_of, run

# optim_inputs_func_adamw("cuda") of torch.testing._internal.common_optimizers, which imports packages that users lack,
# and the last one of its list for "mps". torch has no capturable=True on the CPU, where its numbers would be the same.
CONFIGURATIONS = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "capturable": {"capturable": True},
    "capturable, amsgrad": {"weight_decay": 0.1, "amsgrad": True, "capturable": True},
    "tensor lr with capturable and amsgrad": {"lr": torch.tensor(0.001), "amsgrad": True, "capturable": True},
    "tensor lr, tensor betas, with capturable and amsgrad": {
        "lr": torch.tensor(0.001),
        "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])),
        "amsgrad": True,
        "capturable": True,
    },
    "tensor lr, tensor betas, with capturable": {
        "lr": torch.tensor(0.001),
        "betas": (torch.tensor(0.9), torch.tensor(0.99)),
        "capturable": True,
    },
    "tensor lr": {"lr": torch.tensor(0.01)},
}
ON_CPU = {"capturable": False} if DEVICE.type == "cpu" else {}


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("steps", [30, pytest.param(100, marks=pytest.mark.long)])
def test_torchs_own_configurations(configuration, steps, launches):
    ours, theirs = pair(theirs=ON_CPU, **configuration)
    run(ours, theirs, steps=steps)
    assert_same(ours, theirs)
    assert launches() == {"adamw_kernel": steps}


def test_float16_is_torchs_fused():
    """torch's fused AdamW computes in float32 and rounds when it stores; its default rounds after every operation."""
    ours, theirs = pair(make_params(dtype=torch.float16), lr=1e-2, weight_decay=0.1, eps=1e-4, fused=True)
    run(ours, theirs, steps=20)
    assert_same(ours, theirs, tolerance=4e-3)


def test_mixed_dtypes_have_a_launch_each(launches):
    params = [*make_params([(40,)]), *make_params([(40,)], torch.float16), *make_params([(20,)], torch.float64)]
    ours, theirs = pair(params, fused=True)
    run(ours, theirs, steps=3)
    assert launches() == {"adamw_kernel": 9}
    assert_same(ours, theirs, tolerance=2e-3)


def test_gradients_that_are_none_now_and_then(launches):
    ours, theirs = pair(lr=1e-2)
    run(ours, theirs, steps=40, missing=lambda step: {step % 4, (step // 3) % 4})
    assert_same(ours, theirs)
    assert len({float(ours.state[p]["step"]) for p in params_of(ours)}) > 1
    before = launches()
    give_gradients(ours, missing={0, 1, 2})
    ours.step()
    assert launches() == before, "nothing to do is no launch"


def test_frozen_at_times():
    ours, theirs = pair(lr=1e-2)
    for step in range(20):
        for optimizer in (ours, theirs):
            params = params_of(optimizer)
            params[0].requires_grad_(step % 5 < 3)
            optimizer.zero_grad()
            sum((p * p * (step + 1)).sum() for p in params).backward()
            optimizer.step()
    assert_same(ours, theirs)


def test_groups_with_numbers_of_their_own(launches):
    a, b, c = make_params()
    groups = [
        {"params": [a], "lr": 1e-2, "weight_decay": 0.3},
        {"params": [b], "betas": (0.5, 0.9), "eps": 1e-3},
        {"params": [c], "maximize": True},
    ]
    ours, theirs = pair(groups)
    run(ours, theirs, steps=20)
    assert_same(ours, theirs)
    assert launches() == {"adamw_kernel": 20}


def test_groups_that_differ_in_amsgrad():
    a, b, c = make_params()
    ours, theirs = pair([{"params": [a, b], "amsgrad": True}, {"params": [c]}])
    run(ours, theirs, steps=20)
    assert_same(ours, theirs)


def test_add_param_group_midway():
    ours, theirs = pair(lr=1e-2)
    run(ours, theirs, steps=5)
    added = make_params([(9,), (4, 4)])
    ours.add_param_group({"params": added, "lr": 3e-3})
    theirs.add_param_group({"params": copy.deepcopy(added), "lr": 3e-3})
    run(ours, theirs, steps=5)
    assert_same(ours, theirs)


def test_named_parameters():
    model = nn.Linear(3, 2).to(DEVICE)
    optimizer = fastbert.AdamW(model.named_parameters())
    give_gradients(optimizer)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_closure_and_hooks():
    ours, theirs = pair()
    seen = []
    for optimizer in (ours, theirs):
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))

        def closure(optimizer=optimizer):
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        assert optimizer.step(closure).requires_grad
    assert seen == ["before", "after"] * 2
    assert_same(ours, theirs)
    assert ours.step() is None


def test_memory_of_any_form():
    def place(param):
        data = param.detach()
        return nn.Parameter(data.t()) if data.dim() == 2 else nn.Parameter(torch.stack([data, data], -1)[..., 0])

    ours, theirs = pair([place(p) for p in make_params([(16, 20), (33,), (6,)])])
    run(ours, theirs, steps=10)
    assert_same(ours, theirs)


def test_parameters_that_move():
    ours, theirs = pair()
    run(ours, theirs, steps=3)
    for optimizer in (ours, theirs):
        for param in params_of(optimizer):
            param.data = param.data.clone()
    run(ours, theirs, steps=3)
    assert_same(ours, theirs)


def test_tables_are_built_once():
    ours, _ = pair()
    for step in range(5):
        if step == 0:
            give_gradients(ours)
        ours.param_groups[0]["lr"] = 0.1 / (step + 1)
        ours.step()
    assert (ours._tables.built, ours._tables.uploaded) == (1, 1)
    give_gradients(ours, missing={0})
    ours.step()
    assert (ours._tables.built, ours._tables.uploaded) == (2, 2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_duplicates_go_on_by_themselves(duplicate):
    ours, _ = pair(lr=1e-2)
    give_gradients(ours)
    ours.step()
    other = duplicate(ours)
    run(ours, other, steps=3, first=1)
    assert_bitwise(ours, other)


def test_isinstance():
    ours, _ = pair()
    assert isinstance(ours, torch.optim.Optimizer) and isinstance(ours, torch.optim.AdamW)
    give_gradients(ours)
    ours.step()


@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_ignored_arguments_say_why(name, caplog):
    from fastbert import optim

    optim._log_ignored.cache_clear()
    optimizer = fastbert.AdamW(make_params(), **{name: True})
    fastbert.AdamW(make_params(), **{name: True})
    assert [record.message.startswith(f"fastbert.AdamW: {name} is ignored") for record in caplog.records] == [True]
    assert not optimizer.param_groups[0][name]


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"weight_decay": -1.0},
        {"lr": torch.zeros(2)},
        {"betas": (0.9, torch.tensor(0.9))},
    ],
    ids=str,
)
def test_torchs_errors(arguments):
    with pytest.raises(ValueError) as theirs:
        torch.optim.AdamW(make_params(), **arguments)
    with pytest.raises(ValueError) as ours:
        fastbert.AdamW(make_params(), **arguments)
    assert str(ours.value) == str(theirs.value)


def test_no_derivative():
    with pytest.raises(ValueError, match="differentiable: expected False, got True"):
        fastbert.AdamW(make_params(), differentiable=True)


def test_sparse_gradient():
    ours, theirs = pair()
    messages = []
    for optimizer in (ours, theirs):
        param = params_of(optimizer)[0]
        param.grad = torch.ones_like(param).to_sparse()
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_complex_parameter():
    param = nn.Parameter(torch.zeros(3, dtype=torch.complex64, device=DEVICE))
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="floating point Tensors.*complex64"):
        fastbert.AdamW([param]).step()
