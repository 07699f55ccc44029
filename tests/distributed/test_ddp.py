"""DistributedDataParallel around a patched model trains like the stock model in one process on the same global batch."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

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
    stock_gradients,
    stock_run,
)
from tests.models.tiny import CLASSIFICATION, MLM, Kind
from tests.ranks import on_ranks


def train(
    rank: int,
    *,
    world: int = 2,
    kind: Kind = MLM,
    patch: dict[str, Any] | None = None,
    patch_first: bool = True,
    prepare: Callable[[nn.Module], Any] | None = None,
    prepare_patched: Callable[[nn.Module], Any] | None = None,
    wrap: Callable[..., nn.Module] = DistributedDataParallel,
    micro: int = 1,
    recomputed: bool = False,
    zero: bool = False,
    without: Iterable[str] = (),
    **settings: Any,
) -> None:
    """Train as a user would, then compare losses and parameters with stock, and check that the kernels ran."""
    model = model_of(kind)
    if prepare is not None:
        prepare(model)
    if patch_first:
        fastbert.patch(model, **patch or {})
    if prepare_patched is not None:
        prepare_patched(model)
    parallel = wrap(model, **settings)
    if not patch_first:
        assert fastbert.patch(parallel, **patch or {}) is parallel
    trained = [parameter for parameter in parallel.parameters() if parameter.requires_grad]
    if zero:
        optimizer = ZeroRedundancyOptimizer(trained, optimizer_class=fastbert.AdamW, **OPTIMIZER)
    else:
        optimizer = fastbert.AdamW(trained, **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append([])
        for part in range(micro):
            with nullcontext() if part == micro - 1 else parallel.no_sync():
                loss = parallel(**batch_of(rank, kind, step * micro + part)).loss
                (loss / micro).backward()
            losses[step].append(loss.item())
        optimizer.step()
    assert_launched(kind, calls=STEPS * micro, recomputed=recomputed, without=without)
    assert_layers(parallel)
    if kind is CLASSIFICATION or "unpad" in (patch or {}):
        assert_packed(parallel)
    expected = stock_run(kind, world, micro=micro, prepare=prepare)
    assert_losses(losses, expected, rank)
    assert_parameters(dict(parallel.named_parameters()), expected)
    fastbert.unpatch(parallel)
    assert not any(row.state == "active" for row in fastbert.report(parallel).rows)


def freeze_embeddings(model: nn.Module) -> None:
    model.bert.embeddings.requires_grad_(False)


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def wrap_layers(model: nn.Module, reentrant: bool = False) -> None:
    """Wrap each layer as torchtitan and accelerate do."""
    layers = model.bert.encoder.layer
    for index, layer in enumerate(layers):
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)


SCENARIOS: dict[str, dict[str, Any]] = {
    "wrapped, then patched": {"patch_first": False},
    "unused parameters, in tiny buckets": {"find_unused_parameters": True, "bucket_cap_mb": 0.005},
    "no_sync, gradients in buckets": {"micro": 2, "gradient_as_bucket_view": True},
    "static graph, checkpointed": {
        "static_graph": True,
        "prepare_patched": partial(checkpoint, reentrant=False),
        "recomputed": True,
    },
    "packing mlm": {"patch": {"mlm_logits": "none", "unpad": True}},
    "frozen embeddings": {"prepare": freeze_embeddings, "without": ["embedding_layernorm_bwd_kernel"]},
    "ZeRO-1 by torch": {"zero": True},
}
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed, reentrant": {"prepare_patched": partial(checkpoint, reentrant=True), "recomputed": True},
    "layers in checkpoint wrappers": {"prepare_patched": wrap_layers, "recomputed": True},
    "packing classification in checkpoint wrappers": {
        "kind": CLASSIFICATION,
        "prepare_patched": partial(wrap_layers, reentrant=True),
        "recomputed": True,
    },
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "gradients in buckets": {"gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 0.005},
    "no_sync": {"micro": 3},
    "checkpointed": {"prepare_patched": partial(checkpoint, reentrant=False), "recomputed": True},
    "layers in checkpoint wrappers, then patched": {"prepare_patched": wrap_layers, "patch_first": False, "recomputed": True},
    "classification": {"kind": CLASSIFICATION},
    "classification in checkpoint wrappers": {"kind": CLASSIFICATION, "prepare_patched": wrap_layers, "recomputed": True},
    "mlm without logits": {"patch": {"mlm_logits": "none"}},
    "replicate": {"wrap": replicate},
    "replicate, then patched": {"wrap": replicate, "patch_first": False},
}


def train_in_turn(rank: int, world: int, names: list[str]) -> None:
    for name in names:
        with named(name):
            train(rank, world=world, **(SCENARIOS | MORE)[name])


def compressed(rank: int) -> None:
    """Gradients that travel in half precision are rounded to 11 bits before and after the sum of the ranks."""
    parallel = DistributedDataParallel(fastbert.patch(model_of()))
    parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    parallel(**batch_of(rank)).loss.backward()
    assert_launched(calls=1)
    stock = stock_gradients()
    largest = max(float(gradient.abs().max()) for gradient in stock.values())
    assert_parameters({name: p.grad for name, p in parallel.named_parameters()}, stock, atol=2 * largest * 2.0**-11)


def uneven(rank: int) -> None:
    """The second rank has one batch less: Join lets it follow the collectives of the first."""
    parallel = DistributedDataParallel(fastbert.patch(model_of()))
    optimizer = fastbert.AdamW(parallel.parameters(), **OPTIMIZER)
    with Join([parallel]):
        for step in range(STEPS - rank):
            optimizer.zero_grad()
            parallel(**batch_of(rank, step=step)).loss.backward()
            optimizer.step()
    assert_launched(calls=STEPS - rank)
    expected = stock_run(share=lambda step, rank: 0.5 if step < STEPS - rank else 0.0)
    assert_parameters(dict(parallel.named_parameters()), expected)  # the rank that ends last gives its parameters to all


def commonly_used(rank: int) -> None:
    train_in_turn(rank, 2, list(SCENARIOS))
    for work in (compressed, uneven):
        with named(work.__name__):
            work(rank)


def test_ddp() -> None:
    on_ranks(2, commonly_used)


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_ddp_of_another_form(name: str) -> None:
    on_ranks(2, train_in_turn, 2, [name])


@pytest.mark.long
def test_four_ranks() -> None:
    on_ranks(4, train_in_turn, 4, ["unused parameters, in tiny buckets", "packing mlm"])
