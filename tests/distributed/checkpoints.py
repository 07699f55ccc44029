"""Trains a tiny BERT for some steps on any number of ranks, from and to checkpoints of torch.distributed.checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastbert
from tests.models.tiny import MLM, make, make_batch

ROWS = 4  # of every global batch, which the ranks share
STEPS, HALF = 3, 2  # a checkpoint is taken after two steps
ARGUMENTS = {"lr": 1e-3, "weight_decay": 0.1}


def batch_of(step: int) -> dict[str, Tensor]:
    """This rank's rows of the global batch of a step."""
    halves = [make_batch(MLM, seed=10 * step + half) for half in range(ROWS // 2)]
    rows = {name: torch.cat([half[name] for half in halves]).cpu() for name in halves[0]}
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return {name: value.chunk(world)[rank] for name, value in rows.items()}


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The mean over the rows' mean losses, so that the mean over ranks does not depend on their number."""
    batch = batch_of(step)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), batch["labels"], reduction="none")
    return (losses.sum(1) / (batch["labels"] != -100).sum(1)).mean()


def make_training(
    engine: str, optimizer: type = fastbert.AdamW, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    """A model under `engine` ("plain", "ddp" or "fsdp") and its optimizer; patched unless that is torch's own."""
    model = make(MLM, dtype, attention="sdpa", seed=seed, num_hidden_layers=1).cpu().train()
    if optimizer is fastbert.AdamW:
        fastbert.patch(model)
    if engine == "fsdp":
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    return model, optimizer(fastbert.param_groups(model, **ARGUMENTS), **options)


def train(model: nn.Module, optimizer: Any, steps: range, after: Callable[[int], None] = lambda step: None) -> list[float]:
    """The losses over all ranks of these steps."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
        after(step)
    return losses


def save(model: nn.Module, optimizer: Any, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Any, folder: Path, **options: Any) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def outcome(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Parameters and the optimizer's state, whole and in a copy, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        state = {key: value for key, value in optimizer.state[parameter].items()} | {"parameter": parameter.detach()}
        for key, value in state.items():
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{name.removeprefix('module.')} {key}"] = value.clone()
    return found
