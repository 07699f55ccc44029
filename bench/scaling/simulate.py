"""Simulates one optimizer step of a model on many GPUs: the tasks of one rank, which all ranks run alike.

compute   forward and backward, part by part: operations of bench.core.flops at an assumed share of a product's measured rate.
          A part's backward is two forwards. The optimizer runs at its measured rate.
DDP       a bucket's all-reduce starts when the part that fills it has run its backward and the bucket before it is reduced.
FSDP2     a layer's weights are gathered while earlier layers compute: in the forward up to two layers ahead, in the backward
          one (FSDPParamGroup.wait_for_unshard, _backward_prefetch). Its gradients are scattered after its backward, one layer's
          at a time. All of these queue on one communicator; HSDP's all-reduce between nodes has its own.

Not simulated: the host, copies in and out of buckets and flat buffers, the SMs that NCCL takes from compute, the network's
contention and failures, reading data, and ranks that differ (bench.scaling.imbalance).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.core.floors import adamw_bytes
from bench.scaling import volumes
from bench.scaling.assumptions import Assumptions
from bench.scaling.collectives import seconds
from bench.scaling.parts import Model
from bench.scaling.schedule import BETWEEN_NODES, COMPUTE, NETWORK, Task, run
from bench.scaling.volumes import Collective, Group, Sharding

BACKWARD = 2  # forwards
DEFAULT = Assumptions()


@dataclass(frozen=True)
class Batch:
    """What one GPU computes per optimizer step: `accumulation` batches of `rows` sequences without padding."""

    rows: int = 32
    seqlen: int = 512
    accumulation: int = 1


@dataclass(frozen=True)
class Step:
    """Times of one step in seconds. compute: forward and backward. communication: time during which a collective runs, summed
    over streams. latency: what of `seconds` would be saved if hops took no time."""

    seconds: float
    compute: float
    optimizer: float
    communication: float
    latency: float = 0.0

    @property
    def exposed(self) -> float:
        """Time in which compute waits for communication."""
        return max(0.0, self.seconds - self.compute - self.optimizer)

    @property
    def overlap(self) -> float:
        """Share of communication that runs beside compute."""
        return max(0.0, min(1.0, 1 - self.exposed / self.communication)) if self.communication else 1.0

    @property
    def efficiency(self) -> float:
        """Share of the step that is forward and backward."""
        return self.compute / self.seconds

    @property
    def limit(self) -> str:
        """What costs most beside forward and backward, if it is more than a twentieth of the step."""
        costs = {
            "optimizer": self.optimizer,
            "latency": min(self.latency, self.exposed),
            "bandwidth": self.exposed - min(self.latency, self.exposed),
        }
        name = max(costs, key=costs.__getitem__)
        return name if costs[name] > 0.05 * self.seconds else "compute"


@dataclass(frozen=True)
class Engine:
    """How gradients and weights are shared out: DDP without `sharding`, otherwise FSDP2; hybrid: HSDP."""

    name: str
    sharding: Sharding | None = None
    hybrid: bool = False
    itemsize: int = 4
    bucket_cap_mb: float | None = None


DDP = Engine("DDP")
COMPRESSED = Engine("DDP, bf16_compress_hook", itemsize=2)
FSDP = Engine("FSDP2, bf16 weights", Sharding())
HSDP = Engine("HSDP, bf16 weights", Sharding(), hybrid=True)
ENGINES = (DDP, COMPRESSED, FSDP, HSDP)


def step(model: Model, engine: Engine, ranks: int, batch: Batch, machine: Assumptions = DEFAULT) -> Step:
    """Simulate one step.

    Raises:
        ValueError: the ranks do not fill their nodes.
    """
    if ranks < 1 or (ranks > machine.node and ranks % machine.node):
        raise ValueError(f"ranks: expected at most {machine.node}, or a multiple of it, got {ranks}")
    found = _step(model, engine, ranks, batch, machine)
    fast = _step(model, engine, ranks, batch, machine.without_latency())
    return Step(found.seconds, found.compute, found.optimizer, found.communication, found.seconds - fast.seconds)


def _step(model: Model, engine: Engine, ranks: int, batch: Batch, machine: Assumptions) -> Step:
    issued = tasks(model, engine, ranks, batch, machine)
    optimizer = issued[-1].seconds
    compute = sum(task.seconds for task in issued if task.stream == COMPUTE) - optimizer
    communication = sum(task.seconds for task in issued if task.stream != COMPUTE)
    return Step(run(issued)["optimizer"].end, compute, optimizer, communication)


def tasks(model: Model, engine: Engine, ranks: int, batch: Batch, machine: Assumptions) -> list[Task]:
    """All tasks of a step in the order in which they are issued; the optimizer's is the last."""
    rate = machine.product_rate * machine.busy
    forward = [n / rate for n in model.forward_flops([batch.seqlen] * batch.rows)]
    shares = 1
    if engine.sharding is None:
        collectives = volumes.ddp(model, ranks, engine.itemsize, engine.bucket_cap_mb)
        issued = list(_ddp(model, forward, collectives, batch.accumulation, machine))
    else:
        node = min(machine.node, ranks) if engine.hybrid else None
        shares = node or ranks
        groups = volumes.fsdp_groups(model, ranks, engine.sharding, node)
        issued = list(_fsdp(groups, forward, batch.accumulation, machine))
    optimizer = model.numel / shares * adamw_bytes() / machine.optimizer_rate
    return [*issued, Task("optimizer", COMPUTE, optimizer, tuple(task.name for task in issued))]


def _forward(names: Iterable[str], forward: Iterable[float], turn: int) -> Iterator[Task]:
    for name, duration in reversed([*zip(names, forward, strict=True)]):
        yield Task(f"forward {turn} {name}", COMPUTE, duration)


def _ddp(
    model: Model, forward: list[float], collectives: list[Collective], accumulation: int, machine: Assumptions
) -> Iterator[Task]:
    names = [part.name for part in model.parts]
    waiting = list(enumerate(collectives))
    for turn in range(accumulation):
        yield from _forward(names, forward, turn)
        for name, duration in zip(names, forward, strict=True):
            done = Task(f"backward {turn} {name}", COMPUTE, BACKWARD * duration)
            yield done
            while turn == accumulation - 1 and waiting and waiting[0][1].part == name:
                i, collective = waiting.pop(0)
                yield Task(f"bucket {i}", NETWORK, seconds(collective, machine), (done.name,))


def _fsdp(groups: list[Group], forward: list[float], accumulation: int, machine: Assumptions) -> Iterator[Task]:
    for turn in range(accumulation):
        yield from _fsdp_forward(groups, forward, turn, machine)
        yield from _fsdp_backward(groups, forward, turn, turn == accumulation - 1, machine)


def _fsdp_forward(groups: list[Group], forward: list[float], turn: int, machine: Assumptions) -> Iterator[Task]:
    root, *layers = groups
    before = (f"backward {turn - 1} {layers[0].name}",) if turn else ()  # the root waits for what was issued before its forward
    yield _network(f"gather {turn} root", root.gather, machine, before)
    for i, layer in enumerate(layers):
        copied = (
            (f"forward {turn} {layers[i - 3].name}",) if i >= 3 else ()
        )  # then layer i - 2 is copied out and frees its buffer
        yield (gathered := _network(f"gather {turn} {layer.name}", layer.gather, machine, copied))
        yield Task(f"forward {turn} {layer.name}", COMPUTE, forward[1], (gathered.name,))
    yield Task(f"forward {turn} head", COMPUTE, forward[0])


def _fsdp_backward(groups: list[Group], forward: list[float], turn: int, last: bool, machine: Assumptions) -> Iterator[Task]:
    root, *layers = groups
    order = layers[::-1]
    done = f"backward {turn} head"
    yield from _again(order[0], turn, machine, f"forward {turn} head")
    yield Task(done, COMPUTE, BACKWARD * forward[0])
    for i, layer in enumerate(order):
        if i + 1 < len(order):
            yield from _again(order[i + 1], turn, machine, done)
        waits = [f"again {turn} {layer.name}"] if layer.again else []
        if last and i >= 2:  # one reduce-scatter's input is kept at a time
            waits.append(f"scatter {order[i - 2].name}")
        done = f"backward {turn} {layer.name}"
        yield Task(done, COMPUTE, BACKWARD * forward[1], tuple(waits))
        if last:
            yield from _reduced(layer, done, machine)
    if last:
        yield from _reduced(root, done, machine)


def _again(layer: Group, turn: int, machine: Assumptions, after: str) -> Iterator[Task]:
    if layer.again:
        yield _network(f"again {turn} {layer.name}", layer.again, machine, (after,))


def _network(name: str, collective: Collective, machine: Assumptions, after: tuple[str, ...]) -> Task:
    return Task(name, NETWORK, seconds(collective, machine), after)


def _reduced(group: Group, after: str, machine: Assumptions) -> Iterator[Task]:
    yield (scattered := _network(f"scatter {group.name}", group.scatter, machine, (after,)))
    if group.reduce:
        yield Task(f"reduce {group.name}", BETWEEN_NODES, seconds(group.reduce, machine), (scattered.name,))
