"""The tables of docs/scaling.md, by the names of their markers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.report.table import Table
from bench.scaling import volumes
from bench.scaling.assumptions import Assumptions
from bench.scaling.imbalance import Rows, stretch
from bench.scaling.parts import Model, bert
from bench.scaling.simulate import DDP, ENGINES, FSDP, HSDP, Batch, Engine, Step, step
from bench.scaling.volumes import BETWEEN, Collective, Sharding, sent

GPUS = (8, 64, 1024)
SEQLENS = (512, 128)
MOST_TOKENS = 16384  # of one GPU's batch; more rows are accumulated
LAMB = ((65536, 128), (32768, 512), (4096, 512))  # rows x their length; the first two are those of arXiv 1904.00962
TENSOR_RANKS = 8
HOPS = ("start", "ring_inside", "ring_between", "tree_inside", "tree_between")
SIMPLE = dict(zip(HOPS, (8.4e-6, 3.4e-6, 14e-6, 4e-6, 14e-6), strict=True))  # from NCCL's cost model
STEPS = 50  # simulated for one number of imbalance
FOUR_FLOATS = 16  # bytes: a float32 weight, its gradient and AdamW's two moments


@dataclass(frozen=True)
class Question:
    """What the tables are about."""

    model: str = "BERT-large"
    gpus: tuple[int, ...] = GPUS
    rows: int = 32
    machine: Assumptions = Assumptions()


def assumptions(question: Question, model: Model) -> Table:
    rows = [(f"`{name}`", _quantity(value, unit), source) for name, value, unit, source in question.machine.described()]
    return Table(("assumption", "value", "where it comes from"), rows)


def _quantity(value: float, unit: str) -> str:
    scales = {"operations/s": (1e12, "TFLOP/s"), "bytes/s": (1e9, "GB/s"), "s": (1e-6, "us"), "share": (1.0, "")}
    scale, name = scales.get(unit, (1.0, unit))
    return f"{value / scale:,.4g} {name}".strip()


Listing = Callable[[int], list[Collective]]


def volume(question: Question, model: Model) -> Table:
    """MB that one rank sends per step, by engine and number of ranks."""
    node = question.machine.node
    tokens = MOST_TOKENS
    listings: dict[str, Listing] = {
        "DDP, float32 gradients": lambda n: volumes.ddp(model, n),
        "DDP, bf16_compress_hook": lambda n: volumes.ddp(model, n, itemsize=2),
        "FSDP2, float32": lambda n: volumes.fsdp(model, n, Sharding(parameter_itemsize=4)),
        "FSDP2, bf16 weights, float32 gradients": lambda n: volumes.fsdp(model, n),
        "the same, reshard_after_forward=False": lambda n: volumes.fsdp(model, n, Sharding(reshard_after_forward=False)),
        f"HSDP in nodes of {node}, bf16 weights": lambda n: volumes.fsdp(model, n, node=min(n, node)),
        "ZeRO-1, bf16": lambda n: volumes.zero1(model, n),
    }
    rows = [(name, _count(of(question.gpus[-1])), *(_megabytes(of(n)) for n in question.gpus)) for name, of in listings.items()]
    parallel = volumes.tensor_parallel(model.config, tokens, TENSOR_RANKS)
    name = f"tensor parallel over {TENSOR_RANKS}, {tokens:,} tokens, bf16"
    rows.append((name, _count(parallel), *[_megabytes(parallel)] * len(question.gpus)))
    state = model.numel * FOUR_FLOATS / 1e9
    note = (
        f"{question.model} with its pre-training head has {model.numel:,} parameters, tied weights counted once. In float32 "
        f"they, their gradients and AdamW's moments take {state:.2f} GB, which DDP keeps on each GPU."
    )
    return Table(("engine", "collectives", *(f"MB sent by one of {n:,}" for n in question.gpus)), rows, ["", note])


def _count(collectives: list[Collective]) -> str:
    kinds = [one.kind for one in collectives]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _megabytes(collectives: list[Collective]) -> str:
    between = sent(collectives, BETWEEN)
    rest = f"{(sent(collectives) - between) / 1e6:,.0f}"
    return f"{rest} + {between / 1e6:,.0f} between nodes" if between else rest


STEP_HEADINGS = (
    *("GPUs", "rows of one GPU", "engine", "step, ms", "forward and backward", "optimizer", "collectives", "exposed"),
    *("overlapped", "efficiency", "what costs most beside forward and backward"),
)


def steps(question: Question, model: Model) -> Table:
    """One step with a batch that grows with the number of GPUs."""
    rows = []
    for gpus in question.gpus:
        for seqlen in SEQLENS:
            for engine in ENGINES:
                found = step(model, engine, gpus, Batch(question.rows, seqlen), question.machine)
                rows.append((f"{gpus:,}", f"{question.rows} x {seqlen}", engine.name, *_cells(found)))
    return Table(STEP_HEADINGS, rows, ["", _of_one_op(question, model)])


def _of_one_op(question: Question, model: Model) -> str:
    """What it costs DDP that all gradients of a layer arrive together."""
    found = []
    for seqlen in SEQLENS:
        batch = Batch(question.rows, seqlen)
        later = [
            step(model, DDP, n, batch, question.machine).seconds - step(stock, DDP, n, batch, question.machine).seconds
            for stock in [model.by_module()]
            for n in question.gpus
        ]
        found.append(f"{', '.join(f'{1e3 * t:.2f}' for t in later)} ms with rows of {seqlen}")
    counts = ", ".join(f"{n:,}" for n in question.gpus)
    return (
        "A stock layer hands its gradients over module by module, a patched one all together. Of the steps of DDP above, on "
        f"{counts} GPUs, that is {'; '.join(found)}."
    )


def _cells(found: Step) -> Sequence[str]:
    times = (found.seconds, found.compute, found.optimizer, found.communication, found.exposed)
    return (*(f"{1e3 * t:.1f}" for t in times), f"{found.overlap:.0%}", f"{found.efficiency:.0%}", found.limit)


def split(rows: int, seqlen: int, gpus: int) -> Batch | None:
    """A global batch of `rows` sequences on this many GPUs; None if they do not share it equally."""
    if rows % gpus:
        return None
    own = rows // gpus
    most = max(1, MOST_TOKENS // seqlen)
    accumulation = -(-own // most)
    return Batch(own // accumulation, seqlen, accumulation) if own % accumulation == 0 else None


def global_batch(question: Question, model: Model) -> Table:
    """One step of a batch that stays the same with more GPUs."""
    rows = []
    for total, seqlen in LAMB:
        for gpus in question.gpus:
            batch = split(total, seqlen, gpus)
            if batch is None:
                continue
            found = [step(model, engine, gpus, batch, question.machine) for engine in (DDP, FSDP, HSDP)]
            shape = f"{batch.accumulation} x {batch.rows}" if batch.accumulation > 1 else f"{batch.rows}"
            cells = [f"{one.seconds * 1e3:,.1f} ms, {one.efficiency:.0%}, {one.limit}" for one in found]
            rows.append((f"{total:,} x {seqlen}", f"{gpus:,}", shape, *cells))
    headings = ("global batch", "GPUs", "rows of one GPU", *(f"{e.name}: step, efficiency, cost" for e in (DDP, FSDP, HSDP)))
    return Table(headings, rows)


def changes(question: Question, model: Model) -> Table:
    """Efficiency at the largest number of GPUs when one assumption changes."""
    base = question.machine
    gpus = question.gpus[-1]
    machines = {
        "as assumed": base,
        "busy 0.25": replace(base, busy=0.25),
        "busy 0.75": replace(base, busy=0.75),
        "all latencies halved": replace(base, **{name: getattr(base, name) / 2 for name in HOPS}),
        "all latencies doubled": replace(base, **{name: getattr(base, name) * 2 for name in HOPS}),
        "hops of NCCL's protocol Simple": replace(base, **SIMPLE),
        "network cards of 200 Gbit/s": replace(base, between_rate=25e9),
        "network cards of 100 Gbit/s": replace(base, between_rate=12.5e9),
        "link_share 0.5": replace(base, link_share=0.5),
    }
    engines = (DDP, replace(DDP, name="DDP, bucket_cap_mb=100", bucket_cap_mb=100), FSDP, _KEPT, HSDP)
    rows = [
        (
            f"{question.rows} x {seqlen}",
            name,
            *(_efficiency(model, engine, gpus, question.rows, seqlen, m) for engine in engines),
        )
        for seqlen in SEQLENS
        for name, m in machines.items()
    ]
    return Table(("rows of one GPU", "changed", *(engine.name for engine in engines)), rows)


_KEPT = Engine("FSDP2, reshard_after_forward=False", Sharding(reshard_after_forward=False))


def _efficiency(model: Model, engine: Engine, gpus: int, rows: int, seqlen: int, machine: Assumptions) -> str:
    return f"{step(model, engine, gpus, Batch(rows, seqlen), machine).efficiency:.0%}"


def tokens(question: Question, model: Model) -> Table:
    """How much longer a step takes with batches of unequal work."""
    rows = []
    for per_rank in (8, 32, 128):
        for gpus in question.gpus:
            found = stretch(model.config, Rows(per_rank), gpus, STEPS)
            cells = (f"{value:.2f}" for value in (found.padded, found.drawn, found.balanced))
            rows.append((str(per_rank), f"{gpus:,}", *cells))
    headings = ("rows of one GPU", "GPUs", "padded", "packed", "packed, equal tokens on each GPU")
    return Table(headings, rows)


TABLES: dict[str, Callable[[Question, Model], Table]] = {
    "scaling-assumptions": assumptions,
    "scaling-volume": volume,
    "scaling-steps": steps,
    "scaling-global-batch": global_batch,
    "scaling-changes": changes,
    "scaling-tokens": tokens,
}


def built(question: Question) -> dict[str, Table]:
    """All tables, by name."""
    model = bert(question.model)
    return {name: table(question, model) for name, table in TABLES.items()}
