"""FSDP2 over gloo: the optimizer steps on local shards, and the result matches one stock process."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastbert
from tests.models.test_distributed import WORLD, batch_of, on_two_processes  # noqa: F401  a fixture
from tests.models.tiny import MLM, make

STEPS = 3
ARGUMENTS = {"lr": 1e-3, "weight_decay": 0.1}


def stock():
    model = make(MLM).cpu()
    optimizer = torch.optim.AdamW(model.parameters(), **ARGUMENTS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (model(**batch_of(rank)).loss / WORLD).backward()
        optimizer.step()
    return model, optimizer


def sharded(rank):
    from fastbert.kernels.core.launch import counts

    model = make(MLM).cpu()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = fastbert.AdamW(model.parameters(), **ARGUMENTS)
    launches = 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch_of(rank)).loss.backward()
        optimizer.step()
        launches += len(optimizer._tables.launches)  # unaligned shards take a separate launch
    assert counts["adamw_kernel"] == launches <= 2 * STEPS, counts

    expected, theirs = stock()
    for name, parameter in model.named_parameters():
        assert isinstance(optimizer.state[parameter]["exp_avg"], DTensor)
        if not name.endswith("key.bias"):
            other = expected.get_parameter(name)
            torch.testing.assert_close(parameter.full_tensor(), other, rtol=0.0, atol=1e-5, msg=name)
            moment = optimizer.state[parameter]["exp_avg_sq"].full_tensor()
            torch.testing.assert_close(moment, theirs.state[other]["exp_avg_sq"], rtol=0.0, atol=1e-5, msg=name)


@pytest.mark.long  # each commit runs it in test_two_processes_quickly, in the same two processes
def test_sharded(on_two_processes):  # noqa: F811
    on_two_processes(sharded)
