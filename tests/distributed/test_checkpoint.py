"""torch.distributed.checkpoint around a patched model and fastbert.AdamW: a resumed run is the uninterrupted one."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import fastbert
from tests.distributed.checkpoints import HALF, STEPS, load, loss_of, make_training, outcome, save, train
from tests.ranks import on_ranks

torch_adamw, fast_adamw = torch.optim.AdamW, fastbert.AdamW


def first_run(rank, folder, engine, **options):
    """All steps, with a checkpoint on the way. The end goes to a file."""
    model, optimizer = make_training(engine, **options)
    losses = train(model, optimizer, range(HALF))
    save(model, optimizer, folder / "checkpoint")
    losses += train(model, optimizer, range(HALF, STEPS))
    if engine == "fsdp":
        states = optimizer.state_dict()["state"].values()
        assert all(isinstance(value, DTensor) for state in states for name, value in state.items() if name != "step")
    write_end(rank, folder, losses, outcome(model, optimizer))


def write_end(rank, folder, losses, found):
    if rank == 0:
        torch.save((losses, found), folder / "end.pt")


def second_run(rank, folder, engine, exact=True, **options):
    """The steps after the checkpoint, in new processes, from another model."""
    model, optimizer = make_training(engine, seed=1, **options)
    load(model, optimizer, folder / "checkpoint")
    losses = train(model, optimizer, range(HALF, STEPS))
    assert_same_end(folder, losses, outcome(model, optimizer), exact)


def assert_same_end(folder, losses, found, exact):
    expected_losses, expected = torch.load(folder / "end.pt")
    assert found.keys() == expected.keys()
    bound = {"rtol": 0.0, "atol": 0.0 if exact else 1e-5}
    torch.testing.assert_close(losses, expected_losses[-len(losses) :], **bound)
    for name, value in expected.items():
        if exact or "key.bias" not in name:  # its gradient is rounding alone
            torch.testing.assert_close(found[name], value, **bound, msg=name)


def on_two_ranks_first(rank, folder):
    for engine in ("ddp", "fsdp"):
        first_run(rank, folder / engine, engine)


def on_two_ranks_then(rank, folder):
    for engine in ("ddp", "fsdp"):
        second_run(rank, folder / engine, engine)
    whole_state(rank, folder / "fsdp")
    saved_while_training(rank, folder / "fsdp")


def whole_state(rank, folder):
    """The checkpoint's state without shards, on the first rank, continues in one process."""
    model, optimizer = make_training("fsdp", seed=1)
    load(model, optimizer, folder / "checkpoint")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        assert not any(isinstance(value, DTensor) for value in model_state.values())
        torch.save((model_state, optimizer_state), folder / "whole.pt")


def saved_while_training(rank, folder):
    """async_save copies the state: steps that are taken while it writes do not change the checkpoint."""
    model, optimizer = make_training("fsdp", seed=1)
    load(model, optimizer, folder / "checkpoint")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    apart = dist.new_group()  # its collectives run beside those of the training
    state = {"model": model_state, "optimizer": optimizer_state}
    saving = dcp.async_save(state, checkpoint_id=folder / "async", process_group=apart)
    train(model, optimizer, range(1))
    saving.result()
    load(model, optimizer, folder / "async")
    assert_same_end(folder, train(model, optimizer, range(HALF, STEPS)), outcome(model, optimizer), exact=True)


def test_resuming(tmp_path):
    """On two ranks to the last bit, then on one: from the shards, and from the state that was gathered."""
    for engine in ("ddp", "fsdp"):
        (tmp_path / engine).mkdir()
    on_ranks(2, on_two_ranks_first, tmp_path)
    on_ranks(2, on_two_ranks_then, tmp_path)
    second_run(0, tmp_path / "fsdp", "plain", exact=False)
    model, optimizer = make_training("plain", seed=1)
    model_state, optimizer_state = torch.load(tmp_path / "fsdp/whole.pt")
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    assert_same_end(tmp_path / "fsdp", train(model, optimizer, range(HALF, STEPS)), outcome(model, optimizer), exact=False)


RESHARDED = [("fsdp", 2, 4), ("fsdp", 4, 2), ("fsdp", 1, 2), ("ddp", 2, 4), ("ddp", 4, 2)]


@pytest.mark.long
@pytest.mark.parametrize(("engine", "before", "after"), RESHARDED)
def test_another_number_of_ranks(engine, before, after, tmp_path):
    on_ranks(before, first_run, tmp_path, engine)
    on_ranks(after, second_run_elsewhere, tmp_path, engine)


def second_run_elsewhere(rank, folder, engine):
    second_run(rank, folder, engine, exact=False)


OPTIONS = [{"amsgrad": True}, {"dtype": torch.float16, "master_weights": True}, {"optimizer": torch_adamw}]


def first_runs(rank, folder, engine):
    for i, options in enumerate(OPTIONS):
        first_run(rank, folder / str(i), engine, **options)


def second_runs(rank, folder, engine):
    for i, options in enumerate(OPTIONS):
        second_run(rank, folder / str(i), engine, **options)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_options(engine, tmp_path):
    """amsgrad, masters, and stock, which is also resumed to the last bit."""
    for i in range(len(OPTIONS)):
        (tmp_path / str(i)).mkdir()
    on_ranks(2, first_runs, tmp_path, engine)
    on_ranks(2, second_runs, tmp_path, engine)


@pytest.mark.parametrize("amsgrad", [pytest.param(False, marks=pytest.mark.long, id=""), pytest.param(True, id="amsgrad")])
@pytest.mark.parametrize(
    ("first", "then"), [(torch_adamw, fast_adamw), (fast_adamw, torch_adamw)], ids=["from-torch", "to-torch"]
)
def test_exchanged_with_stock(first, then, amsgrad, tmp_path):
    first_run(0, tmp_path, "plain", optimizer=first, amsgrad=amsgrad)
    second_run(0, tmp_path, "plain", exact=False, optimizer=then, amsgrad=amsgrad)


def test_masters_beside_a_checkpoint_without(tmp_path):
    """torch's checkpoint has none; what the optimizer made for the old parameters must not overwrite the loaded ones."""
    model, optimizer = make_training("plain", optimizer=torch_adamw, dtype=torch.float16, eps=1e-3)
    train(model, optimizer, range(1))
    save(model, optimizer, tmp_path)
    expected = loss_of(model, 1).detach()
    model, optimizer = make_training("plain", seed=1, dtype=torch.float16, master_weights=True)
    load(model, optimizer, tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(1))
    # The saved parameters in float16, where a loss has three digits; another model's masters would give a loss far from it.
    torch.testing.assert_close(loss_of(model, 1).detach(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"dtype": torch.float16, "master_weights": True}], ids=str)
def test_asking_for_the_state_of_a_new_optimizer(options, tmp_path):
    """torch takes a step without gradients and learning rate then. It changes no parameter and is as counted as torch's own."""
    model, optimizer = make_training("plain", **options)
    before = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert all(torch.equal(value, before[name]) for name, value in get_model_state_dict(model).items())
    stock, other = make_training("plain", optimizer=torch_adamw)
    theirs = get_optimizer_state_dict(stock, other)["state"]
    assert state.keys() == theirs.keys()
    assert {name: own["step"] for name, own in state.items()} == {name: own["step"] for name, own in theirs.items()}
    assert all(not own["exp_avg"].any() and not own["exp_avg_sq"].any() for own in state.values())
    assert all(group["lr"] == 1e-3 for group in optimizer.param_groups)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flat_state_from_stock():
    """With a name for each tensor and number, as torch makes it for several optimizers."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    stock, theirs = make_training("plain", optimizer=torch_adamw)
    train(stock, theirs, range(1))
    flat = get_optimizer_state_dict(stock, theirs, options=options)
    model, ours = make_training("plain")
    set_optimizer_state_dict(model, ours, flat, options=options)
    expected = outcome(stock, theirs)
    found = outcome(model, ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items() if not name.endswith("parameter"))
