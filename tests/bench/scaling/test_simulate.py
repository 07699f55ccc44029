"""The simulator against steps computed by hand, and what must hold of any machine."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.scaling import volumes
from bench.scaling.assumptions import Assumptions
from bench.scaling.buckets import buckets
from bench.scaling.collectives import ring, seconds, tree
from bench.scaling.parts import Model
from bench.scaling.schedule import NETWORK, run
from bench.scaling.simulate import DDP, ENGINES, FSDP, HSDP, Batch, Engine, Step, step, tasks
from bench.scaling.volumes import ALL_GATHER, ALL_REDUCE, BETWEEN, INSIDE, REDUCE_SCATTER, Collective, Sharding
from tests.bench.scaling.tiny import tiny
from tests.distributed.recorded import place_of
from tests.distributed.test_order import SHARDED, assert_none_waits

BATCH = Batch(rows=4, seqlen=64)
SLOW = replace(Assumptions(), product_rate=1e9)  # compute takes long enough to hide whatever can be hidden
QUICK = replace(Assumptions(), product_rate=1e30, optimizer_rate=1e30)  # compute takes no time
ONE_BUCKET = replace(DDP, bucket_cap_mb=1000)


def compute(model: Model, machine: Assumptions, batch: Batch = BATCH) -> float:
    return 3 * sum(model.forward_flops([batch.seqlen] * batch.rows)) / (machine.product_rate * machine.busy)


def test_ring_within_a_node():
    machine = Assumptions()
    of = Collective(ALL_REDUCE, 8_000_000, 8, "")
    by_hand = 14e-6 + 2 * 7 * 1.9e-6 + 2 * 7 / 8 * 8e6 / (0.8 * 450e9)
    assert ring(of, machine) == pytest.approx(by_hand)
    assert ring(replace(of, kind=ALL_GATHER), machine) == pytest.approx(14e-6 + 7 * 1.9e-6 + 7 / 8 * 8e6 / (0.8 * 450e9))


def test_ring_over_nodes_uses_all_cards():
    of = Collective(REDUCE_SCATTER, 8_000_000, 64, "")
    by_hand = 14e-6 + 56 * 1.9e-6 + 7 * 4e-6 + 63 / 64 * 8e6 / (0.8 * 8 * 50e9)
    assert seconds(of, Assumptions()) == pytest.approx(by_hand)


def test_ring_of_one_gpu_a_node():
    of = Collective(ALL_REDUCE, 8_000_000, 16, "", BETWEEN)
    assert ring(of, Assumptions()) == pytest.approx(14e-6 + 30 * 8.5e-6 + 2 * 15 / 16 * 8e6 / (0.8 * 50e9))


def test_tree_wins_over_many_ranks():
    of = Collective(ALL_REDUCE, 1_000_000, 1024, "")
    by_hand = 14e-6 + 2 * (7 * 1.25e-6 + 7 * 8.5e-6) + 2 * 1e6 / (0.8 * 0.8 * 400e9)
    assert tree(of, Assumptions()) == seconds(of, Assumptions()) == pytest.approx(by_hand)
    few = Collective(ALL_REDUCE, 100_000_000, 8, "")
    assert seconds(few, Assumptions()) == ring(few, Assumptions()) < tree(few, Assumptions())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_one_gpu(engine):
    found = step(tiny(), engine, 1, BATCH, SLOW)
    optimizer = tiny().numel * 7 * 4 / 3.99e12  # reads four numbers of a parameter and writes three
    assert (found.exposed, found.communication, found.overlap) == (0, 0, 1)
    assert found.seconds == pytest.approx(compute(tiny(), SLOW) + optimizer)


def test_one_bucket_overlaps_nothing():
    found = step(tiny(), ONE_BUCKET, 8, BATCH, SLOW)
    alone = seconds(Collective(ALL_REDUCE, 4 * tiny().numel, 8, ""), SLOW)
    assert found.exposed == pytest.approx(alone) == pytest.approx(found.communication)
    assert found.overlap == pytest.approx(0, abs=1e-6)


def test_buckets_hide_behind_a_slow_backward():
    """What the last layer of the backward and the embeddings fill is exposed, as no compute comes after them."""
    engine = replace(DDP, bucket_cap_mb=0.05)
    collectives = volumes.ddp(tiny(), 8, bucket_cap_mb=0.05)
    late = [seconds(one, SLOW) for one in collectives if one.part in ("bert.encoder.layer.0", "embeddings")]
    assert 0 < len(late) < len(collectives)
    assert step(tiny(), engine, 8, BATCH, SLOW).exposed == pytest.approx(sum(late), rel=1e-6)


def test_latency_alone():
    machine = replace(QUICK, inside_rate=1e30)
    found = step(tiny(), DDP, 8, BATCH, machine)
    hops = len(volumes.ddp(tiny(), 8)) * (14e-6 + 14 * 1.25e-6)  # up and down a chain of 8
    assert found.seconds == pytest.approx(hops) == pytest.approx(found.latency)
    assert found.limit == "latency" and step(tiny(), DDP, 8, BATCH, SLOW).limit == "compute"
    assert step(tiny(), DDP, 8, BATCH, replace(QUICK, inside_rate=1.0)).limit == "bandwidth"


def test_fsdp_hides_all_but_its_ends():
    """Exposed: the gathers of the root and of the first layer, the scatters of the first layer and of the root."""
    root, first, *_ = volumes.fsdp_groups(tiny(4), 8)
    ends = (root.gather, first.gather, first.scatter, root.scatter)
    found = step(tiny(4), FSDP, 8, BATCH, SLOW)
    assert found.exposed == pytest.approx(sum(seconds(one, SLOW) for one in ends), rel=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_fsdp_without_compute_is_a_queue(kept):
    sharding = Sharding(reshard_after_forward=not kept)
    found = step(tiny(), Engine("FSDP2", sharding), 8, BATCH, QUICK)
    queue = sum(seconds(one, QUICK) for one in volumes.fsdp(tiny(), 8, sharding))
    assert found.seconds == pytest.approx(queue) == pytest.approx(found.communication)


@pytest.mark.parametrize("machine", [SLOW, QUICK, Assumptions()], ids=["slow", "quick", "as assumed"])
def test_fsdp_runs_nothing_before_what_it_needs(machine):
    spans = run(tasks(tiny(5), FSDP, 8, replace(BATCH, accumulation=2), machine))
    layers = [layer.name for layer in reversed(tiny(5).layers)]
    for turn in range(2):
        for i, layer in enumerate(layers):
            forward, backward = spans[f"forward {turn} {layer}"], spans[f"backward {turn} {layer}"]
            gather, again = spans[f"gather {turn} {layer}"], spans[f"again {turn} {layer}"]
            assert gather.end <= forward.start and again.end <= backward.start
            if i >= 3:
                assert spans[f"forward {turn} {layers[i - 3]}"].end <= gather.start, "two layers ahead at most"
            if i + 2 < len(layers):
                assert spans[f"backward {turn} {layers[i + 2]}"].end <= again.start, "one layer ahead at most"
    for layer in layers:
        assert spans[f"backward 1 {layer}"].end <= spans[f"scatter {layer}"].start
    assert spans["optimizer"].start >= max(span.end for name, span in spans.items() if name != "optimizer")


def test_fsdp_issues_collectives_in_the_recorded_order():
    """That of tests/distributed/test_order.py, where FSDP2 shards a model of three layers."""
    kinds = {"gather 0": "all-gather", "again 0": "all-gather", "scatter": "reduce-scatter"}
    issued = [task.name for task in tasks(tiny(3), FSDP, 2, BATCH, SLOW) if task.stream == NETWORK]
    found = []
    for name in issued:
        kind = next(kind for kind in kinds if name.startswith(kind))
        place = name.removeprefix(f"{kind} ").replace("bert.encoder.layer.", "layer ").replace("root", "the rest")
        found.append(f"{kinds[kind]} of {place}")
    assert found == [line for line in SHARDED.strip().splitlines() if line.startswith(tuple(kinds.values()))]


def test_ddp_issues_buckets_where_they_are_recorded():
    """Behind the backward of the lowest layer that has a gradient in the bucket, before that of the next."""
    order = [task.name for task in tasks(tiny(3), replace(DDP, bucket_cap_mb=0.05), 2, BATCH, SLOW)]
    events = []
    for name in order:
        if name.startswith("backward 0 bert"):
            events.append(name.replace("backward 0 bert.encoder.layer.", "backward of layer "))
        elif name.startswith("bucket"):
            names = buckets(tiny(3), bucket_cap_mb=0.05)[int(name.split()[1])].names
            events.append(f"all-reduce of {', '.join(dict.fromkeys(map(place_of, names)))}")
    assert_none_waits(events)
    assert len(events) > 6


def test_hsdp_reduces_beside_the_next_scatter():
    """Without compute: all of a node's collectives, and behind the last of them its all-reduce between nodes."""
    found = step(tiny(), HSDP, 16, BATCH, QUICK)
    collectives = volumes.fsdp(tiny(), 16, node=8)
    inside = sum(seconds(one, QUICK) for one in collectives if one.where == INSIDE)
    between = [seconds(one, QUICK) for one in collectives if one.where == BETWEEN]
    assert inside + min(between) <= found.seconds <= inside + sum(between)
    assert found.communication == pytest.approx(inside + sum(between))


def test_accumulation_reduces_once():
    twice = replace(BATCH, accumulation=2)
    once = step(tiny(), ONE_BUCKET, 8, BATCH, SLOW)
    found = step(tiny(), ONE_BUCKET, 8, twice, SLOW)
    assert found.communication == once.communication and found.compute == pytest.approx(2 * once.compute)
    assert found.exposed == pytest.approx(once.exposed), "behind the last backward"
    gathers = [one for one in volumes.fsdp(tiny(), 8) if one.kind == ALL_GATHER]
    more = sum(seconds(one, SLOW) for one in gathers)
    of = [step(tiny(), FSDP, 8, batch, SLOW).communication for batch in (BATCH, twice)]
    assert of[1] - of[0] == pytest.approx(more), "weights are gathered again, gradients are not"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 8, 64, 1024]), st.floats(1e9, 1e15), st.sampled_from([0.01, 0.05, 1.0]))
def test_layers_that_hand_over_together_cost_a_bucket_and_a_layer_at_most(ranks, product, cap):
    machine = replace(Assumptions(), product_rate=product)
    engine = replace(DDP, bucket_cap_mb=cap)
    ours, stock = (step(model, engine, ranks, BATCH, machine) for model in (tiny(3), tiny(3).by_module()))
    largest = max(seconds(one, machine) for one in volumes.ddp(tiny(3), ranks, bucket_cap_mb=cap))
    assert ours.compute == pytest.approx(stock.compute)
    assert ours.seconds - stock.seconds <= largest * len(volumes.ddp(tiny(1), ranks, bucket_cap_mb=cap)) + ours.compute / 3


def test_ranks_that_do_not_fill_nodes():
    with pytest.raises(ValueError, match="ranks: expected at most 8, or a multiple of it, got 12"):
        step(tiny(), DDP, 12, BATCH)


MACHINES = st.builds(
    lambda product, busy, link, start, hop: replace(
        Assumptions(), product_rate=product, busy=busy, link_share=link, start=start, ring_inside=hop, tree_between=hop
    ),
    st.floats(1e9, 1e15),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
)
RANKS = st.sampled_from([1, 2, 8, 64, 1024])
ANY_ENGINE = st.sampled_from(ENGINES)


@settings(max_examples=60, deadline=None)
@given(ANY_ENGINE, RANKS, MACHINES)
def test_bounds_of_any_machine(engine, ranks, machine):
    found = step(tiny(3), engine, ranks, BATCH, machine)
    least = found.compute + found.optimizer
    assert least <= found.seconds * (1 + 1e-9) and found.seconds <= (least + found.communication) * (1 + 1e-9)
    assert 0 <= found.overlap <= 1 and 0 < found.efficiency <= 1 and found.latency >= -1e-12


@settings(max_examples=60, deadline=None)
@given(ANY_ENGINE, RANKS, MACHINES, st.floats(1, 10))
def test_a_better_machine_is_never_slower(engine, ranks, machine, factor):
    def time(**changed: float) -> float:
        return step(tiny(3), engine, ranks, BATCH, replace(machine, **changed)).seconds

    worst = time() * (1 + 1e-9)
    assert time(inside_rate=machine.inside_rate * factor, between_rate=machine.between_rate * factor) <= worst
    assert time(start=machine.start / factor, tree_between=machine.tree_between / factor) <= worst
    assert time(product_rate=machine.product_rate * factor) <= worst
    assert time(optimizer_rate=machine.optimizer_rate * factor) <= worst


@settings(max_examples=30, deadline=None)
@given(MACHINES)
def test_more_ranks_are_never_faster_for_the_same_rows_each(machine):
    times = [step(tiny(3), DDP, ranks, BATCH, machine).seconds for ranks in (1, 2, 4, 8, 16, 64, 256, 1024)]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(times, times[1:], strict=False)), times


def test_the_words_of_a_limit():
    assert Step(1.0, 0.5, 0.4, 0.1).limit == "optimizer"
    assert Step(1.0, 0.97, 0.01, 0.1).limit == "compute"
