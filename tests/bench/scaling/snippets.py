"""The code blocks of docs/scaling.md on two ranks, for test_page.py. A module of its own: the ranks import it."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import fastbert
from tests.models.tiny import MLM, make, make_batch

PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
DDP, ACCUMULATION, WEIGHTS, FSDP, MESH, TENSOR, SAVE, LOAD = re.findall(r"```python\n(.*?)```", PAGE, re.S)
TOGETHER = "dist.init_process_group()\n"  # what tests/ranks.py has done
ROWS = 2


def batch_of(rank: int) -> dict[str, Tensor]:
    """Rank 1 has fewer labels."""
    batch = {name: tensor.cpu() for name, tensor in make_batch(MLM, mask="none", seed=10 + rank).items()}
    if rank:
        batch["labels"][:, 1:6] = -100
    return batch


def names(rank: int) -> dict[str, Any]:
    return {"model": make(MLM).cpu(), "batches": [batch_of(rank)] * 2, "accumulation": 2, "device": "cpu"}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_trained(model: torch.nn.Module) -> None:
    """Both ranks have the same new parameters, and kernels have run."""
    before = make(MLM).cpu().state_dict()
    for name, parameter in model.named_parameters():
        mine = whole(parameter.detach())
        other = mine.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(mine, other), name
        if not name.endswith("key.bias"):  # whose gradient is zero: it moves all scores of a query alike
            assert not torch.equal(mine, before[name]), name
    assert any(row.state == "active" and row.kernel_calls for row in fastbert.report(model).rows)


def train(namespace: dict[str, Any]) -> None:
    namespace["model"](**namespace["batches"][0]).loss.backward()
    namespace["optimizer"].step()


def ddp(rank: int) -> None:
    assert DDP.count(TOGETHER) == 1
    namespace = names(rank)
    exec(DDP.replace(TOGETHER, ""), namespace)
    exec(ACCUMULATION, namespace)
    assert_trained(namespace["model"])


def weights(rank: int) -> None:
    """The gradient of one stock process with the rows of both ranks."""
    stock = make(MLM).cpu()
    both = [batch_of(0), batch_of(1)]
    stock(**{name: torch.cat([batch[name] for batch in both]) for name in both[0]}).loss.backward()
    model = fastbert.patch(make(MLM).cpu())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    exec(WEIGHTS, {"dist": dist, "parallel": parallel, "batch": batch_of(rank)})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, msg=name)


def fsdp(rank: int) -> None:
    namespace = names(rank) | {"torch": torch, "fastbert": fastbert}
    exec(FSDP.replace("bfloat16", "float16"), namespace)  # Triton's interpreter has no bfloat16
    assert all(isinstance(p, DTensor) for p in namespace["model"].parameters())
    train(namespace)
    assert_trained(namespace["model"])


def mesh(rank: int) -> None:
    namespace = names(rank) | {"fully_shard": torch.distributed.fsdp.fully_shard, "nodes": 2, "gpus_of_a_node": 1}
    fastbert.patch(namespace["model"]).train()
    exec(MESH, namespace)
    namespace["optimizer"] = fastbert.AdamW(namespace["model"].parameters(), lr=1e-3)
    train(namespace)
    assert_trained(namespace["model"])


def tensor_parallel(rank: int) -> None:
    """Two heads on two ranks: the loss and a gradient of stock."""
    namespace = names(rank) | {"fastbert": fastbert, "init_device_mesh": init_device_mesh, "ranks": 2}
    exec(TENSOR, namespace)
    stock, batch = make(MLM).cpu(), batch_of(0)
    losses = [model(**batch).loss for model in (stock, namespace["model"])]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    mine, other = (model.get_parameter(name).grad for model in (namespace["model"], stock))
    assert isinstance(mine, DTensor)
    torch.testing.assert_close(whole(mine), other)
    (layer, *_) = [row for row in fastbert.report(namespace["model"]).rows if row.module == "bert.encoder.layer.0"]
    assert layer.state == "module by module", layer


def checkpoints(rank: int, folder: str) -> None:
    """Saved from FSDP2, loaded into a whole model."""
    saved = names(rank) | {"torch": torch, "fastbert": fastbert, "folder": folder}
    exec(FSDP.replace(", mp_policy=policy", ""), saved)
    train(saved)
    exec(SAVE, saved)
    model = fastbert.patch(make(MLM, seed=5).cpu()).train()
    loaded = saved | {"model": model, "optimizer": fastbert.AdamW(fastbert.param_groups(model, lr=2e-5, weight_decay=0.01))}
    exec(LOAD, loaded)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole(saved["model"].get_parameter(name).detach())), name
        moment = saved["optimizer"].state[saved["model"].get_parameter(name)]["exp_avg"]
        assert torch.equal(loaded["optimizer"].state[parameter]["exp_avg"], whole(moment)), name


def run_all(rank: int, folder: str) -> None:
    for work in (ddp, weights, fsdp, mesh, tensor_parallel):
        work(rank)
    checkpoints(rank, folder)
