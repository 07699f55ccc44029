"""One autograd.Function a layer delays no collective: engines issue them in stock's order, as soon as their data exist."""

import itertools
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbert
from tests.distributed.data import assert_layers, batch_of, model_of, named
from tests.distributed.recorded import Events, note_buckets, noting_collectives, recording
from tests.ranks import on_ranks

LAYERS = 3
# With buckets of 10 kB, four a layer: as the stock model has it.
BUCKETS = """
forward of layer 0
forward of layer 1
forward of layer 2
backward of layer 2
all-reduce of layer 2, head
all-reduce of layer 2
all-reduce of layer 2
backward of layer 1
all-reduce of layer 2, layer 1
all-reduce of layer 1
all-reduce of layer 1
backward of layer 0
all-reduce of layer 1, layer 0
all-reduce of layer 0
all-reduce of layer 0
all-reduce of layer 0, embeddings
all-reduce of embeddings
"""
# FSDP2 gathers a layer when it is called, and by itself prefetches the next layer of the backward.
SHARDED = """
all-gather of the rest
forward of layer 0
all-gather of layer 0
forward of layer 1
all-gather of layer 1
forward of layer 2
all-gather of layer 2
all-gather of layer 2
all-gather of layer 1
backward of layer 2
reduce-scatter of layer 2
all-gather of layer 0
backward of layer 1
reduce-scatter of layer 1
backward of layer 0
reduce-scatter of layer 0
reduce-scatter of the rest
"""
# Told to prefetch, it gathers the next layer before the present one computes its forward.
PREFETCHED = """
all-gather of the rest
forward of layer 0
all-gather of layer 0
all-gather of layer 1
forward of layer 1
all-gather of layer 2
forward of layer 2
all-gather of layer 2
all-gather of layer 1
backward of layer 2
reduce-scatter of layer 2
all-gather of layer 0
backward of layer 1
reduce-scatter of layer 1
backward of layer 0
reduce-scatter of layer 0
reduce-scatter of the rest
"""


def of_ddp(rank: int, patched: bool, **settings: Any) -> Events:
    """The events of a step, after the first, in which DDP sorts its buckets by the order of the gradients."""
    model = model_of(num_hidden_layers=LAYERS)
    parallel = DistributedDataParallel(fastbert.patch(model) if patched else model, **settings)
    with recording(model.bert.encoder.layer) as events:
        note_buckets(parallel, events)
        for step in range(2):
            events.clear()
            parallel(**batch_of(rank, step=step)).loss.backward()
    if patched:
        assert_layers(parallel)
    return events


def of_fsdp(rank: int, patched: bool, prefetch: bool) -> Events:
    model = model_of(num_hidden_layers=LAYERS)
    if patched:
        fastbert.patch(model)
    layers = model.bert.encoder.layer
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    if prefetch:
        set_prefetch(layers)
    with recording(layers) as events, noting_collectives(events):
        model(**batch_of(rank)).loss.backward()
    if patched:
        assert_layers(model)
    return events


def set_prefetch(layers: nn.ModuleList) -> None:
    for layer, after in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([layer])


def assert_order(events: Events, expected: str) -> None:
    assert "\n".join(events) == expected.strip()


def assert_none_waits(events: Events) -> None:
    """Check that each bucket is sent before the backward goes on below the lowest layer that has gradients in it.

    Buckets that reach across a border, into the layer below, wait for that layer; no other bucket does.
    """
    current = LAYERS
    sent = 0
    for event in events:
        if event.startswith("backward of layer "):
            current = int(event.removeprefix("backward of layer "))
        elif event.startswith("all-reduce of "):
            places = event.removeprefix("all-reduce of ").split(", ")
            depths = [int(place.removeprefix("layer ")) for place in places if place.startswith("layer ")]
            lowest = -1 if "embeddings" in places else min(depths, default=LAYERS)
            assert max(lowest, 0) == current, events
            sent += 1
    assert sent > 1, events


def orders(rank: int) -> None:
    with named("buckets in stock's order"):
        small = {"bucket_cap_mb": 0.01}
        assert_order(of_ddp(rank, patched=False, **small), BUCKETS)
        assert_order(of_ddp(rank, patched=True, **small), BUCKETS)
    with named("buckets of about a layer"):
        events = of_ddp(rank, patched=True, bucket_cap_mb=0.045, gradient_as_bucket_view=True)
        assert_none_waits(events)
    for prefetch, expected in ((False, SHARDED), (True, PREFETCHED)):
        with named(f"fsdp2, prefetch {prefetch}"):
            assert_order(of_fsdp(rank, False, prefetch), expected)
            assert_order(of_fsdp(rank, True, prefetch), expected)


def test_order_of_collectives() -> None:
    on_ranks(2, orders)


def test_a_bucket_that_waits_is_noticed() -> None:
    events = BUCKETS.strip().splitlines()
    assert_none_waits(events)
    late = events.index("all-reduce of layer 2")
    events.insert(events.index("backward of layer 1"), events.pop(late))  # after the backward of layer 1 has begun
    with pytest.raises(AssertionError):
        assert_none_waits(events)
