"""Ranks that count the bytes of their collectives, for test_real_run.py. A module of its own: the ranks import it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from bench.scaling import parts, volumes
from bench.scaling.buckets import buckets
from bench.scaling.volumes import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Sharding
from tests.models.tiny import KINDS, make, make_batch

PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")
# Large enough for several buckets of 1 MiB, small enough for the interpreter.
WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 4001}
CAP = 0.25  # MiB
KINDS_OF_OPS = {
    "allreduce_": ALL_REDUCE,
    "all_reduce": ALL_REDUCE,
    "_allgather_base_": ALL_GATHER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
}


class _Collectives(TorchDispatchMode):
    """Lists (kind, bytes of the whole tensor) of the collectives that torch's process groups are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "c10d" or (function.namespace == "_c10d_functional" and name in KINDS_OF_OPS):
            tensors = [a for group in args for a in (group if isinstance(group, list | tuple) else [group])]
            sizes = [a.numel() * a.element_size() for a in tensors if isinstance(a, Tensor)]
            self.found.append((KINDS_OF_OPS.get(name, name), max(sizes)))
        return function(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    with _Collectives() as mode:
        yield mode.found


def model_and_batch(rank: int) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    model = make(PRETRAINING, **WIDE).cpu()
    batch = {name: tensor.cpu() for name, tensor in make_batch(PRETRAINING, seed=rank).items()}
    return fastbert.patch(model), batch


def arrivals(model: torch.nn.Module) -> list[str]:
    """The names of parameters whose gradients have arrived, in order, filled by each backward of the model."""
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: arrived.append(name))
    return arrived


def count_stock(rank: int) -> None:
    """Gradients of each module of a stock layer arrive together, in the order of `by_module` but for head and embeddings."""
    model, batch = model_and_batch(rank)
    arrived = arrivals(fastbert.unpatch(model))
    model(**batch).loss.backward()
    layers = parts.of(model).by_module().parts[1:-1]
    assert [name for name in arrived if ".layer." in name] == [name for part in layers for name in part.parameters], arrived


def count_ddp(rank: int) -> None:
    from fastbert.kernels.core.launch import counts

    model, batch = model_and_batch(rank)
    predicted = parts.of(model)
    arrived = arrivals(model)
    parallel = DistributedDataParallel(model, bucket_cap_mb=CAP)
    reduced: list[tuple[int, int]] = []  # bytes of a bucket, and how many gradients have arrived when it is reduced

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append((bucket.buffer().numel() * 4, len(arrived)))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, hook)
    for _ in range(2):  # buckets are made anew after the first step
        arrived.clear()
        reduced.clear()
        parallel(**batch).loss.backward()
    order = [name for part in predicted.parts for name in part.parameters]
    assert arrived == order, (arrived, order)
    assert counts["attention_bwd_kv_kernel"] or counts["attention_bwd_short_kernel"], counts

    expected = buckets(predicted, bucket_cap_mb=CAP)
    assert [size for size, _ in reduced] == [4 * bucket.numel for bucket in expected] and len(expected) > 4
    # A bucket is reduced as soon as its last gradient is there: nothing of the next part has arrived by then.
    filled = 0
    for (_, there), bucket in zip(reduced, expected, strict=True):
        filled += len(bucket.names)
        (last,) = [i for i, part in enumerate(predicted.parts) if part.name == bucket.last]
        assert filled <= there <= sum(len(part.parameters) for part in predicted.parts[: last + 1]), (bucket.last, there)

    with collectives() as found:
        plain = DistributedDataParallel(model_and_batch(rank)[0], bucket_cap_mb=CAP)
        for _ in range(3):  # the second step begins with broadcasts of the new buckets
            found.clear()
            plain(**batch).loss.backward()
    ids = ("broadcast_", sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()))
    assert sorted(found) == sorted([ids, *((c.kind, c.size) for c in volumes.ddp(predicted, 2, bucket_cap_mb=CAP))]), found


def count_fsdp(rank: int, reshard: bool = True, half: bool = False) -> None:
    model, batch = model_and_batch(rank)
    predicted = parts.of(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    for layer in model.bert.encoder.layer:
        fully_shard(layer, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    with collectives() as found:
        model(**batch).loss.backward()
    expected = volumes.fsdp(predicted, 2, Sharding(2 if half else 4, 4, reshard))
    assert sorted(found) == sorted((c.kind, c.size) for c in expected), (found, expected)


def count_hsdp(rank: int) -> None:
    """Four ranks, as two nodes of two."""
    model, batch = model_and_batch(rank)
    predicted = parts.of(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with collectives() as found:
        model(**batch).loss.backward()
    expected = volumes.fsdp(predicted, 4, Sharding(4, 4), node=2)
    assert sorted(found) == sorted((c.kind, c.size) for c in expected), (found, expected)


def count_tensor_parallel(rank: int) -> None:
    """A stock model: its Linears communicate, whatever runs between them."""
    model = make(PRETRAINING, num_attention_heads=2, attention="sdpa").cpu()
    columns = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("attention.output.dense", "output.dense")}
    for layer in model.bert.encoder.layer:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), plan)
    batch = {name: tensor.cpu() for name, tensor in make_batch(PRETRAINING).items()}
    with collectives() as found:
        model(**batch).loss.backward()
    expected = volumes.tensor_parallel(model.config, batch["input_ids"].numel(), 2, itemsize=4)
    assert sorted(found) == sorted((c.kind, c.size) for c in expected), (found, expected)


def count_all(rank: int) -> None:
    count_stock(rank)
    count_ddp(rank)
    count_fsdp(rank)
    count_fsdp(rank, reshard=False, half=True)
    count_tensor_parallel(rank)
