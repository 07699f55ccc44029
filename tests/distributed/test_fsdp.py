"""FSDP2 and FSDP 1 around a patched model train like the stock model in one process on the same global batch."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import fastbert
from fastbert.dispatch import FastModule
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
    stock_gradients,
    stock_run,
)
from tests.models.tiny import CLASSIFICATION, MLM, Kind
from tests.ranks import on_ranks

HALF = {"param_dtype": torch.float16, "reduce_dtype": torch.float32}


def shard(model: nn.Module, *parts: nn.Module, **settings: Any) -> nn.Module:
    """FSDP2 as its tutorial has it: each layer, and `parts`, by itself, then what is left."""
    for part in (*parts, *model.bert.encoder.layer):
        fully_shard(part, **settings)
    assert fully_shard(model, **settings) is model
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def shard_embeddings(model: nn.Module, **settings: Any) -> nn.Module:
    return shard(model, model.bert.embeddings, **settings)


def shard_with_prefetch(model: nn.Module) -> nn.Module:
    shard(model)
    first, second = model.bert.encoder.layer
    first.set_modules_to_forward_prefetch([second])
    second.set_modules_to_backward_prefetch([first])
    return model


def shard_offloaded(model: nn.Module) -> nn.Module:
    return shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def shard_hybrid(model: nn.Module) -> nn.Module:
    return shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def checkpoint_and_shard(model: nn.Module) -> nn.Module:
    """In accelerate's order."""
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return shard(model)


def shard_and_checkpoint(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return shard(model)


def flatten(model: nn.Module, **settings: Any) -> nn.Module:
    """FSDP 1."""
    layers = ModuleWrapPolicy({type(layer) for layer in model.bert.encoder.layer})
    settings = {"device_id": torch.device("cpu"), "use_orig_params": True} | settings
    parallel = FullyShardedDataParallel(model, auto_wrap_policy=layers, **settings)
    assert len(FullyShardedDataParallel.fsdp_modules(parallel)) == 1 + len(model.bert.encoder.layer)
    return parallel


def flatten_and_checkpoint(model: nn.Module) -> nn.Module:
    parallel = flatten(model)
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return parallel


def train(
    rank: int,
    *,
    world: int = 2,
    wrap: Callable[..., nn.Module] = shard,
    kind: Kind = MLM,
    patch: dict[str, Any] | None = None,
    patch_first: bool = True,
    micro: int = 1,
    clip: float | None = None,
    recomputed: bool = False,
    without: Iterable[str] = (),
) -> None:
    """Train as a user would, then compare losses and parameters with stock, and check that the kernels ran."""
    model = model_of(kind)
    if patch_first:
        fastbert.patch(model, **patch or {})
    parallel = wrap(model)
    if not patch_first:
        fastbert.patch(parallel, **patch or {})
    flat = isinstance(parallel, FullyShardedDataParallel)
    optimizer = fastbert.AdamW(parallel.parameters(), **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append([])
        for part in range(micro):
            if micro > 1:
                model.set_requires_gradient_sync(part == micro - 1)
            loss = parallel(**batch_of(rank, kind, step * micro + part)).loss
            (loss / micro).backward()
            losses[step].append(loss.item())
        if clip is not None and flat:
            parallel.clip_grad_norm_(clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(parallel.parameters(), clip)
        optimizer.step()
    assert_launched(kind, calls=STEPS * micro, recomputed=recomputed, without=without)
    assert_layers(parallel)
    if kind is CLASSIFICATION or "unpad" in (patch or {}):
        assert_packed(parallel)
    expected = stock_run(kind, world, micro=micro, clip=clip)
    assert_losses(losses, expected, rank)
    assert_parameters(whole_parameters(parallel), expected)
    fastbert.unpatch(parallel)
    assert not any(row.state == "active" for row in fastbert.report(parallel).rows)
    assert not any(isinstance(module, FastModule) for module in parallel.modules())


def whole_parameters(parallel: nn.Module) -> dict[str, torch.Tensor]:
    if not isinstance(parallel, FullyShardedDataParallel):
        return {name: parameter.full_tensor() for name, parameter in parallel.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(parallel):
        return {name: parameter.detach().clone() for name, parameter in parallel.named_parameters()}


SCENARIOS: dict[str, dict[str, Any]] = {
    "fsdp2": {"clip": 0.05},
    "fsdp2, then patched": {"patch_first": False, "micro": 2},
    "fsdp2, packing classification": {"kind": CLASSIFICATION},
    "fsdp2, checkpoint wrappers, then patched": {"wrap": checkpoint_and_shard, "patch_first": False, "recomputed": True},
    "fsdp1": {"wrap": flatten},
    "fsdp1, packing classification in checkpoint wrappers": {
        "wrap": flatten_and_checkpoint,
        "kind": CLASSIFICATION,
        "recomputed": True,
    },
}
MORE: dict[str, dict[str, Any]] = {
    "fsdp2, offloaded": {"wrap": shard_offloaded},
    "fsdp2, packing classification, then patched": {"kind": CLASSIFICATION, "patch_first": False},
    "fsdp2, packing mlm": {"patch": {"mlm_logits": "none", "unpad": True}},
    "fsdp2, packing mlm, then patched": {"patch": {"mlm_logits": "none", "unpad": True}, "patch_first": False},
    "fsdp2, parameters kept": {"wrap": partial(shard, reshard_after_forward=False)},
    "fsdp2, checkpoint wrappers": {"wrap": checkpoint_and_shard, "recomputed": True},
    "fsdp2, checkpointed": {"wrap": shard_and_checkpoint, "recomputed": True},
    "fsdp2, embeddings by themselves": {"wrap": shard_embeddings, "kind": CLASSIFICATION},
    "fsdp2, prefetch": {"wrap": shard_with_prefetch},
    "fsdp1, then patched": {"wrap": flatten, "patch_first": False, "clip": 0.05},
    "fsdp1, flat parameters": {"wrap": partial(flatten, use_orig_params=False)},
    "fsdp1, packing classification": {"wrap": flatten, "kind": CLASSIFICATION},
    "fsdp1, packing mlm": {"wrap": flatten, "patch": {"mlm_logits": "none", "unpad": True}},
}


def train_in_turn(rank: int, names: list[str]) -> None:
    for name in names:
        with named(name):
            train(rank, **(SCENARIOS | MORE)[name])


def hybrid(rank: int) -> None:
    with named("hybrid sharding"):
        train(rank, world=4, wrap=shard_hybrid)


HALVES = {
    "fsdp2": partial(shard, mp_policy=MixedPrecisionPolicy(**HALF)),
    "fsdp1": partial(flatten, mixed_precision=MixedPrecision(**HALF, cast_forward_inputs=True)),
}


def in_half_precision(rank: int, engine: str, kind_name: str) -> None:
    """Parameters are gathered and used as float16, and gradients are float32."""
    kind = {"mlm": MLM, "classification": CLASSIFICATION}[kind_name]
    with named(f"{engine} in half precision, {kind}"):
        parallel = HALVES[engine](fastbert.patch(model_of(kind)))
        parallel(**batch_of(rank, kind)).loss.backward()
        assert_launched(kind, calls=1)
        assert_layers(parallel)
        stock = stock_gradients(kind)
        largest = max(float(gradient.abs().max()) for gradient in stock.values())
        assert_parameters(whole_gradients(parallel), stock, atol=8 * largest * 2.0**-11)


def whole_gradients(parallel: nn.Module) -> dict[str, torch.Tensor]:
    if not isinstance(parallel, FullyShardedDataParallel):
        return {name: parameter.grad.full_tensor() for name, parameter in parallel.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(parallel, with_grads=True):
        return {name: parameter.grad.clone() for name, parameter in parallel.named_parameters()}


def commonly_used(rank: int) -> None:
    train_in_turn(rank, list(SCENARIOS))
    in_half_precision(rank, "fsdp2", "mlm")
    in_half_precision(rank, "fsdp1", "classification")


def test_fsdp() -> None:
    on_ranks(2, commonly_used)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mlm", "classification"])
@pytest.mark.parametrize("engine", HALVES)
def test_half_precision(engine: str, kind: str) -> None:
    on_ranks(2, in_half_precision, engine, kind)


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_fsdp_of_another_form(name: str) -> None:
    on_ranks(2, train_in_turn, [name])


@pytest.mark.long
def test_hybrid_sharding() -> None:
    on_ranks(4, hybrid)
