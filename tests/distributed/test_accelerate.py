"""accelerate's own loop around a patched model: DDP, FSDP 1 and FSDP2, accumulation, clipping, saving and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from tests.distributed.data import (
    OPTIMIZER,
    STEPS,
    assert_launched,
    assert_layers,
    assert_losses,
    assert_packed,
    assert_parameters,
    batch_of,
    model_of,
    named,
    stock_run,
)
from tests.distributed.test_fsdp import whole_parameters
from tests.models.tiny import CLASSIFICATION
from tests.ranks import on_ranks

MICRO, CLIP = 2, 0.05


def accelerator_of(fsdp: int | None, activation_checkpointing: bool) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    if fsdp is not None:  # accelerate takes FSDP for GPUs only; all that follows is its own code
        for state in (PartialState(), accelerator.state):
            state.distributed_type, state.device = DistributedType.FSDP, torch.device("cpu")
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=fsdp,
            auto_wrap_policy="transformer_based_wrap",  # by the stock names of the classes
            # By default layers and embeddings, as in _no_split_modules. With the latter, FSDP2 of accelerate 1.15 fails, as it
            # shards the words a second time; and checkpointed embeddings would be launched again.
            transformer_cls_names_to_wrap=["BertLayer"] if fsdp == 2 or activation_checkpointing else None,
            cpu_ram_efficient_loading=False,
            activation_checkpointing=activation_checkpointing,
            state_dict_type="SHARDED_STATE_DICT",  # torch 2.13's FSDP 1 ends the process in making a full one on the CPU
            use_orig_params=True if fsdp == 1 else None,
        )
    return accelerator


def train(rank: int, fsdp: int | None = None, activation_checkpointing: bool = False, folder: Path | None = None) -> None:
    """Train as accelerate's users do; with a folder, also save there, go on, and come back."""
    accelerator = accelerator_of(fsdp, activation_checkpointing)
    model = fastbert.patch(model_of(CLASSIFICATION))
    parallel, optimizer = accelerator.prepare(model, fastbert.AdamW(model.parameters(), **OPTIMIZER))
    losses = [steps(rank, accelerator, parallel, optimizer, step) for step in range(STEPS)]
    wrappers = {
        None: ("DistributedDataParallel", 1),
        1: ("FullyShardedDataParallel", 3 if activation_checkpointing else 4),  # the model, its layers, its embeddings
        2: ("FSDPBertLayer", 2),
    }
    name, number = wrappers[fsdp]
    assert [type(module).__name__ for module in parallel.modules()].count(name) == number
    by_torch = [f"embedding_layernorm_{direction}_kernel" for direction in ("fwd", "bwd") if fsdp == 2]  # the words' have hooks
    assert_launched(CLASSIFICATION, calls=STEPS * MICRO, recomputed=activation_checkpointing, without=by_torch)
    assert_layers(parallel)
    assert_packed(parallel)
    expected = stock_run(CLASSIFICATION, micro=MICRO, clip=CLIP)
    assert_losses(losses, expected, rank)
    assert_parameters(parameters_of(parallel, fsdp), expected)
    if folder is None:
        return

    accelerator.save_state(folder)
    after = steps(rank, accelerator, parallel, optimizer, STEPS), parameters_of(parallel, fsdp)
    accelerator.load_state(folder)
    again = steps(rank, accelerator, parallel, optimizer, STEPS), parameters_of(parallel, fsdp)
    assert after[0] == again[0]
    assert_parameters(again[1], after[1], atol=0.0)


def steps(rank: int, accelerator: Any, parallel: nn.Module, optimizer: Any, step: int) -> list[float]:
    """One step of the optimizer; returns the losses of its micro-batches."""
    losses = []
    for part in range(MICRO):
        with accelerator.accumulate(parallel):
            loss = parallel(**batch_of(rank, CLASSIFICATION, step * MICRO + part)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parallel.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameters_of(parallel: nn.Module, fsdp: int | None) -> dict[str, Tensor]:
    if fsdp is not None:
        return whole_parameters(parallel)
    return {name: parameter.detach().clone() for name, parameter in parallel.named_parameters()}


ENGINES = {
    "ddp": {},
    "fsdp1": {"fsdp": 1},
    "fsdp1, checkpointed": {"fsdp": 1, "activation_checkpointing": True},
    "fsdp2": {"fsdp": 2},
    "fsdp2, checkpointed": {"fsdp": 2, "activation_checkpointing": True},
}


def in_turn(rank: int, names: list[str], folder: Path | None = None) -> None:
    for name in names:
        with named(name):
            train(rank, **ENGINES[name], folder=None if folder is None else folder / name)


def test_accelerate() -> None:
    on_ranks(2, in_turn, ["fsdp1", "fsdp2, checkpointed"])


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_saves_and_resumes(tmp_path: Path, name: str) -> None:
    on_ranks(2, in_turn, [name], tmp_path)
