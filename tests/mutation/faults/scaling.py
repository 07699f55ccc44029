"""What the simulator of many GPUs counts and in which order its streams run."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/bench/scaling"
SIMULATE = f"{TESTS}/test_simulate.py"

_simulate = partial(Fault, file="bench/scaling/simulate.py")
_volumes = partial(Fault, file="bench/scaling/volumes.py")
_collectives = partial(Fault, file="bench/scaling/collectives.py")

FAULTS = (
    _simulate(
        "a bucket is reduced before the backward that fills it",
        before='yield Task(f"bucket {i}", NETWORK, seconds(collective, machine), (done.name,))',
        after='yield Task(f"bucket {i}", NETWORK, seconds(collective, machine))',
        tests=(f"{SIMULATE}::test_one_bucket_overlaps_nothing",),
    ),
    _simulate(
        "the first accumulated batch reduces gradients",
        before="while turn == accumulation - 1 and waiting and waiting[0][1].part == name:",
        after="while waiting and waiting[0][1].part == name:",
        tests=(f"{SIMULATE}::test_accumulation_reduces_once",),
    ),
    _simulate(
        "a layer's backward does not wait for its weights",
        before='waits = [f"again {turn} {layer.name}"] if layer.again else []',
        after="waits = []",
        tests=(f"{SIMULATE}::test_fsdp_runs_nothing_before_what_it_needs",),
    ),
    _simulate(
        "nothing waits for the last gradients",
        before='return [*issued, Task("optimizer", COMPUTE, optimizer, tuple(task.name for task in issued))]',
        after='return [*issued, Task("optimizer", COMPUTE, optimizer)]',
        tests=(f"{SIMULATE}::test_one_bucket_overlaps_nothing",),
    ),
    _collectives(
        "an all-reduce goes between nodes once",
        before="between = passes * (nodes - 1)",
        after="between = nodes - 1",
        tests=(f"{SIMULATE}::test_ring_of_one_gpu_a_node", f"{SIMULATE}::test_tree_wins_over_many_ranks"),
    ),
    _collectives(
        "a ring over nodes uses one network card",
        before="return min(machine.inside_rate, in_node * machine.between_rate)",
        after="return min(machine.inside_rate, machine.between_rate)",
        tests=(f"{SIMULATE}::test_ring_over_nodes_uses_all_cards",),
    ),
    _volumes(
        "FSDP2's padding is not sent",
        before="return -(-rows // ranks) * ranks * (parameter.numel() // rows)",
        after="return parameter.numel()",
        tests=(f"{TESTS}/test_volumes.py::test_fsdp_pads_first_dimensions",),
    ),
    _volumes(
        "the root gathers its weights again",
        before='again = gather if sharding.reshard_after_forward and part.name != "root" else None',
        after="again = gather if sharding.reshard_after_forward else None",
        tests=(f"{TESTS}/test_volumes.py::test_fsdp",),
    ),
    Fault(
        "the first bucket is small with a cap of one's own too",
        file="bench/scaling/buckets.py",
        before="first = dist._DEFAULT_FIRST_BUCKET_BYTES if bucket_cap_mb is None else cap",
        after="first = dist._DEFAULT_FIRST_BUCKET_BYTES",
        tests=(f"{TESTS}/test_volumes.py::test_buckets_of_bert_large",),
    ),
    Fault(
        "ranks do not wait for the slowest",
        file="bench/scaling/imbalance.py",
        before="return float((work.max(axis=1) / even).mean())",
        after="return float((work.mean(axis=1) / even).mean())",
        tests=(f"{TESTS}/test_imbalance.py::test_two_ranks_of_one_row",),
    ),
)
