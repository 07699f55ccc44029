"""Two processes over gloo: DDP and FSDP2 around a patched model match one stock process."""

import os
import socket
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastbert
from fastbert.testing.interpreter import accelerate
from tests.models.tiny import CLASSIFICATION, MLM, make, make_batch

WORLD = 2


def batch_of(rank, kind=MLM):
    return {name: tensor.cpu() for name, tensor in make_batch(kind, seed=10 + rank).items()}


def stock_gradients(kind=MLM):
    """The mean of the gradients of the ranks' batches, in one process."""
    model = make(kind).cpu()
    for rank in range(WORLD):
        (model(**batch_of(rank, kind)).loss / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worker(rank, port, work):
    # A separate process: the setup of conftest.py does not apply here.
    accelerate()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()
    # Exit at once: torch's threads that still run sometimes abort an interpreter that shuts down.
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture
def on_two_processes(monkeypatch):
    def start(work):
        # The CPU, and so the interpreter, also on a machine with a GPU; each process reads this when it imports triton.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.spawn(worker, (port, work), nprocs=WORLD)

    return start


def assert_gradients(found, kind=MLM):
    stock = stock_gradients(kind)
    assert found.keys() == stock.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, stock[name], msg=name)


def assert_launched(forward, kind=MLM):
    from fastbert.kernels.core.launch import counts
    from fastbert.testing.models import expected_launches, of_layers

    assert of_layers(counts) == expected_launches(make(kind), forward=forward, backward=1), counts


def ddp(rank, patch_first=True):
    model = make().cpu()
    parallel = DistributedDataParallel(fastbert.patch(model) if patch_first else model)
    if not patch_first:
        fastbert.patch(parallel)
    parallel(**batch_of(rank)).loss.backward()
    assert_launched(forward=1)
    assert_gradients({name: p.grad for name, p in model.named_parameters()})


def ddp_then_patch(rank):
    ddp(rank, patch_first=False)


def fsdp(rank, patch_first=True, **settings):
    model = make().cpu()
    if patch_first:
        fastbert.patch(model)
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **settings)
    fully_shard(model, **settings)
    if not patch_first:
        fastbert.patch(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loss = model(**batch_of(rank)).loss
    loss.backward()
    assert_launched(forward=1)
    return model


def fsdp_gradients(rank, patch_first=True):
    model = fsdp(rank, patch_first)
    assert_gradients({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    fastbert.unpatch(model)
    assert not any(row.state == "active" for row in fastbert.report(model).rows)


def fsdp_then_patch(rank):
    fsdp_gradients(rank, patch_first=False)


def fsdp_in_half_precision(rank):
    # Parameters are gathered and used as float16; gradients are float32.
    model = fsdp(rank, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32))
    stock = stock_gradients()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor()
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, stock[name], rtol=0.05, atol=5e-3, msg=name)


def by_accelerate(rank, version):
    """Wrap a model like accelerate's transformer_based_wrap, which looks up layer classes by their stock names."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = fastbert.patch(make(CLASSIFICATION, attention="sdpa").cpu())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    if version == 1:
        settings = {"device_id": torch.device("cpu"), "use_orig_params": True}
        parallel = FullyShardedDataParallel(model, auto_wrap_policy=plugin.auto_wrap_policy, **settings)
        assert len(FullyShardedDataParallel.fsdp_modules(parallel)) == 1 + 3  # the model; its embeddings and two layers
    else:
        chosen = tuple(plugin.auto_wrap_policy.keywords["transformer_layer_cls"])
        for module in [module for module in model.modules() if isinstance(module, chosen)]:
            fully_shard(module)
        parallel = fully_shard(model)
    parallel(**batch_of(rank, CLASSIFICATION)).loss.backward()
    assert_launched(forward=1, kind=CLASSIFICATION)
    if version == 1:
        with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
            found = {name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in parallel.named_parameters()}
    else:
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert_gradients(found, CLASSIFICATION)


@pytest.mark.parametrize("work", [ddp, ddp_then_patch, fsdp_gradients, fsdp_then_patch, fsdp_in_half_precision])
@pytest.mark.long
def test_two_processes(work, on_two_processes):
    on_two_processes(work)


def ddp_fsdp_and_the_optimizer(rank):
    from fastbert.kernels.core.launch import counts
    from tests.optim.test_distributed import sharded

    accelerate = [partial(by_accelerate, version=version) for version in (1, 2)]
    for work in (ddp, fsdp_gradients, fsdp_then_patch, *accelerate, sharded):
        counts.clear()
        work(rank)


def test_two_processes_quickly(on_two_processes):
    on_two_processes(ddp_fsdp_and_the_optimizer)
