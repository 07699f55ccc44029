"""docs/scaling.md on two ranks: every engine trains a patched model to the same parameters on both, and restarts."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastbert
from tests.docs.blocks import blocks
from tests.docs.play import Names, Play
from tests.models.tiny import MLM, make, make_batch

RANKS = 2
TOGETHER = "dist.init_process_group()\n"  # what tests/ranks.py has done
PAGE = "docs/scaling.md"


def batch_of(rank: int) -> dict[str, Tensor]:
    """Rank 1 has fewer labels."""
    batch = {name: tensor.cpu() for name, tensor in make_batch(MLM, mask="none", seed=10 + rank).items()}
    if rank:
        batch["labels"][:, 1:6] = -100
    return batch


def names_of(rank: int, **more: Any) -> Names:
    return {"model": make(MLM).cpu(), "batches": [batch_of(rank)] * 2, "accumulation": 2, "device": "cpu"} | more


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


def train(names: Names) -> None:
    names["model"](**names["batches"][0]).loss.backward()
    names["optimizer"].step()


def play(folder: Path, rank: int) -> Play:
    data_parallel = names_of(rank)
    yield data_parallel, {TOGETHER: ""}
    yield data_parallel
    assert_trained(data_parallel["model"])

    # The gradient of one stock process with the rows of both ranks.
    stock = make(MLM).cpu()
    both = [batch_of(0), batch_of(1)]
    stock(**{name: torch.cat([batch[name] for batch in both]) for name in both[0]}).loss.backward()
    model = fastbert.patch(make(MLM).cpu())
    yield {"dist": dist, "parallel": torch.nn.parallel.DistributedDataParallel(model), "batch": batch_of(rank)}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, stock.get_parameter(name).grad, msg=name)

    sharded = names_of(rank, torch=torch, fastbert=fastbert)
    yield sharded, {"bfloat16": "float16"}  # Triton's interpreter has no bfloat16
    assert all(isinstance(p, DTensor) for p in sharded["model"].parameters())
    train(sharded)
    assert_trained(sharded["model"])

    mesh = names_of(rank, fully_shard=fully_shard, nodes=2, gpus_of_a_node=1)
    fastbert.patch(mesh["model"]).train()
    yield mesh
    mesh["optimizer"] = fastbert.AdamW(mesh["model"].parameters(), lr=1e-3)
    train(mesh)
    assert_trained(mesh["model"])

    tensor_parallel = names_of(rank, fastbert=fastbert, init_device_mesh=init_device_mesh, ranks=2)
    yield tensor_parallel
    assert_as_stock(tensor_parallel["model"])

    # Saved from FSDP2, loaded into a whole model.
    saved = names_of(rank, torch=torch, fastbert=fastbert, folder=str(folder / "checkpoint"))
    (fsdp,) = [block for block in blocks(PAGE) if "import MixedPrecisionPolicy" in block.text]
    fsdp.run(saved, {", mp_policy=policy": ""})
    train(saved)
    yield saved
    model = fastbert.patch(make(MLM, seed=5).cpu()).train()
    loaded = saved | {"model": model, "optimizer": fastbert.AdamW(fastbert.param_groups(model, lr=2e-5, weight_decay=0.01))}
    yield loaded
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole(saved["model"].get_parameter(name).detach())), name
        moment = saved["optimizer"].state[saved["model"].get_parameter(name)]["exp_avg"]
        assert torch.equal(loaded["optimizer"].state[parameter]["exp_avg"], whole(moment)), name


def assert_as_stock(model: torch.nn.Module) -> None:
    """Two heads on two ranks: the loss and a gradient of stock."""
    stock, batch = make(MLM).cpu(), batch_of(0)
    losses = [each(**batch).loss for each in (stock, model)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    mine, other = (each.get_parameter(name).grad for each in (model, stock))
    assert isinstance(mine, DTensor)
    torch.testing.assert_close(whole(mine), other)
    (layer, *_) = [row for row in fastbert.report(model).rows if row.module == "bert.encoder.layer.0"]
    assert layer.state == "module by module", layer
