"""DeepSpeed's ZeRO around a patched model trains like DeepSpeed around the stock model.

DeepSpeed compiles an extension for the CPU first, which takes minutes. accelerate leaves DeepSpeed out on a CPU, so
`deepspeed.initialize` is called as accelerate calls it.
"""

import os

import pytest
import torch

import fastbert
from tests.distributed.data import OPTIMIZER, STEPS, assert_layers, assert_parameters, batch_of, model_of, named
from tests.models.tiny import CLASSIFICATION
from tests.ranks import on_ranks

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.long


def train(rank: int, stage: int, patched: bool):
    import deepspeed

    model = model_of(CLASSIFICATION)
    if patched:
        fastbert.patch(model)
    optimizer = (fastbert.AdamW if patched else torch.optim.AdamW)(model.parameters(), **OPTIMIZER)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    losses = []
    for step in range(STEPS):
        loss = engine(**batch_of(rank, CLASSIFICATION, step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if patched and stage < 3:
        assert_layers(engine)
    elif patched:  # ZeRO-3 gathers each parameter in hooks of the module that owns it
        assert_layers(engine, "module by module", "hooks")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def as_stock(rank: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    for stage in (1, 2, 3):
        with named(f"ZeRO-{stage}"):
            (losses, parameters), (stock_losses, stock) = (train(rank, stage, patched) for patched in (True, False))
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(stock_losses))
            assert_parameters(parameters, stock)


def test_zero() -> None:
    on_ranks(2, as_stock)
