"""Builds tables from results, by the names in a document's markers. A missing number is stated in words."""

import math
from collections.abc import Callable

from bench.core import ceilings, comparison, floors
from bench.core.flops import mfu
from bench.core.records import GIB, NOT_REACHED, EncodeRecord, LatencyRecord, ModelRecord, OpRecord, Results
from bench.host import tables
from bench.report.table import Table, literal
from bench.tune.run import best


def provenance(results: Results | None) -> str:
    """The line below every table: where and with what it was measured."""
    if results is None:
        return "No GPU has run this yet."
    here = results.environment
    if results.dry_run:
        return "Dry run on tiny shapes without a GPU: nothing was timed."
    invented = "INVENTED SAMPLE NUMBERS. " if results.invented else ""
    versions = f"torch {here.torch}, triton {here.triton}, transformers {here.transformers}"
    where = f"{here.gpu or 'no GPU'}, driver {here.driver or 'unknown'}, CUDA {here.cuda or 'none'}"
    if here.pretended:
        where = f"A pretended {here.gpu} (a stub driver whose launches do nothing, so times are the host's), CUDA {here.cuda}"
    return f"{invented}{where}; {versions}, Python {here.python}; commit {here.commit or 'unknown'}, {here.date[:10]}."


def environment(results: Results) -> Table:
    here = results.environment
    memory = f"{here.memory_bytes / GIB:.0f} GiB" if here.memory_bytes else comparison.NOT_MEASURED
    rows = [
        ("GPU", here.gpu or "none"),
        ("multiprocessors", str(here.multiprocessors or comparison.NOT_MEASURED)),
        ("memory", memory),
        *((name, value) for name, value in here.clocks.items()),
    ]
    return Table(("what", "read"), rows)


def ceilings_table(results: Results) -> Table:
    units = {ceilings.COPY: "TB/s, bytes read and written", ceilings.PRODUCT: "TFLOP/s"}
    rows = [
        (c.name, f"{c.per_second / 1e12:.2f} {units.get(c.name, '')}", quartiles(c.seconds, 1e3, "ms"))
        for c in results.ceilings
    ]
    return Table(("ceiling", "measured here", "time, median [quartiles]"), rows)


def quartiles(spread: object, scale: float, unit: str) -> str:
    low, median, high = (getattr(spread, name) * scale for name in ("low", "median", "high"))
    return f"{median:.4g} {unit} [{low:.4g}, {high:.4g}]"


def tests(results: Results) -> Table:
    found = results.tests
    if found is None:
        return Table(notes=[f"`pytest -m gpu`: {comparison.NOT_MEASURED}"])
    counts = f"{found.passed} passed, {found.failed} failed, {found.errors} errors, {found.skipped} skipped"
    ended = "" if found.finished else " (stopped before its end)"
    return Table(notes=[f"`pytest -m gpu` in the same run: {counts}{ended}", *(f"- {line}" for line in found.failures)])


def workload(record: ModelRecord) -> str:
    where = "" if record.lengths == "log-normal" else f", lengths of {record.lengths}"
    return f"{record.model} {record.head}, {record.mode}, {record.batch} x {record.seqlen}, fill {record.fill:g}{where}"


MODEL_HEADINGS = (
    "workload",
    "lane",
    "time, median [quartiles]",
    "sequences/s",
    "real tokens/s",
    "MFU",
    "peak memory",
    "first step",
    "against stock",
    "repeated runs",
)


def _model_row(record: ModelRecord, base: ModelRecord | None, product: float | None) -> list[str]:
    if record.seconds is None:
        return [workload(record), record.lane, comparison.why_not(record), *[""] * 7]
    seconds = record.seconds.median
    return [
        workload(record),
        record.lane,
        quartiles(record.seconds, 1e3, "ms"),
        f"{record.batch / seconds:,.1f}",
        f"{record.real_tokens / seconds:,.0f}",
        f"{mfu(record.flops, seconds, product):.1%}" if product else comparison.NOT_MEASURED,
        f"{record.peak_bytes / GIB:.2f} GiB" if record.peak_bytes else comparison.NOT_MEASURED,
        f"{record.first_step_seconds:.1f} s" if record.first_step_seconds else comparison.NOT_MEASURED,
        comparison.ratio(record, base),
        ", ".join(f"{run * 1e3:.4g}" for run in record.runs),
    ]


def models(results: Results, only: Callable[[ModelRecord], bool] = lambda record: True) -> Table:
    """Every lane of every workload, including slower ones and those that did not run."""
    product = results.ceiling(ceilings.PRODUCT)
    rows = []
    for records in comparison.by_case(filter(only, results.models)).values():
        rows += [_model_row(record, comparison.baseline(records), product) for record in records]
    return Table(MODEL_HEADINGS, rows)


def _main_cases(results: Results) -> list[list[ModelRecord]]:
    """Workloads with at least three lanes, otherwise the first four workloads."""
    cases = comparison.by_case(results.models)
    whole = [records for records in cases.values() if len({r.lane for r in records}) >= 3]
    return whole or list(cases.values())[:4]


COLUMNS: dict[str, Callable[[str], bool]] = {
    "stock": "stock".__eq__,
    "best torch.compile": lambda lane: lane.startswith("stock + "),
    "fastbert": "fastbert".__eq__,
    "fastbert, graphed": lambda lane: lane.startswith("fastbert, graphed"),
}
HEADLINE_ROWS = 6


def headline(results: Results) -> Table:
    """The README's table: one row per main workload, the lanes as columns."""
    ours = "fastbert / graphed"
    headings = ("workload", *COLUMNS, f"speed-up: {ours}", f"peak memory: stock / {ours}")
    return Table(headings, [_headline_row(records) for records in _main_cases(results)[:HEADLINE_ROWS]])


def _headline_row(records: list[ModelRecord]) -> list[str]:
    picked = {name: _fastest([r for r in records if suits(r.lane)]) for name, suits in COLUMNS.items()}
    times = [f"{r.seconds.median * 1e3:.3g} ms" if r and r.seconds else _without_time(r) for r in picked.values()]
    stock, _, *ours = picked.values()
    ratios = [comparison.ratio(r, stock) if r else "" for r in ours]
    memory = [f"{r.peak_bytes / GIB:.1f}" if r and r.peak_bytes else "-" for r in (stock, *ours)]
    return [workload(records[0]), *times, " / ".join(ratio or "-" for ratio in ratios), f"{' / '.join(memory)} GiB"]


def _fastest(records: list[ModelRecord]) -> ModelRecord | None:
    """The fastest of the lanes of one column; without a time any of them, which has the reason."""
    return min(records, key=lambda r: r.seconds.median if r.seconds else math.inf, default=None)


def _without_time(record: ModelRecord | None) -> str:
    return comparison.WHY_NOT.get(record.status, comparison.NOT_MEASURED) if record else comparison.NOT_MEASURED


def lanes(results: Results) -> Table:
    """The main workloads, a row per lane, and the main columns of `models`."""
    rows = []
    for records in _main_cases(results):
        rows += [_lane_row(record, comparison.baseline(records)) for record in records]
    return Table(("workload", "lane", "time, median [quartiles]", "real tokens/s", "peak memory", "against stock"), rows)


def _lane_row(record: ModelRecord, base: ModelRecord | None) -> list[str]:
    named = [workload(record), record.lane]
    if record.seconds is None:
        return [*named, comparison.WHY_NOT.get(record.status, comparison.NOT_MEASURED), "", "", ""]
    return [
        *named,
        quartiles(record.seconds, 1e3, "ms"),
        f"{record.real_tokens / record.seconds.median:,.0f}",
        f"{record.peak_bytes / GIB:.2f} GiB" if record.peak_bytes else comparison.NOT_MEASURED,
        comparison.ratio(record, base),
    ]


LATENCY_HEADINGS = ("requests", "lane", "p50 [quartiles]", "p99", "requests/s", "first pass", "p50 against stock")


def requests(record: LatencyRecord) -> str:
    tokens = f"up to {record.seqlen} tokens, mixed" if record.lengths == "mixed" else f"{record.seqlen} tokens"
    return f"{record.model} {record.head}, {record.batch} x {tokens}"


def _latency_row(record: LatencyRecord, base: LatencyRecord | None) -> list[str]:
    if record.seconds is None or record.p99 is None:
        return [requests(record), record.lane, comparison.why_not(record), *[""] * 4]
    first = record.first_pass_seconds
    return [
        requests(record),
        record.lane,
        quartiles(record.seconds, 1e3, "ms"),
        f"{record.p99 * 1e3:.4g} ms",
        f"{1 / record.seconds.median:,.0f}",
        comparison.NOT_MEASURED if first is None else f"{first:.2f} s",
        comparison.ratio(record, base),
    ]


def latencies(results: Results) -> Table:
    """Every lane of every stream of requests."""
    rows = []
    for records in comparison.by_case(results.latency).values():
        rows += [_latency_row(record, comparison.baseline(records)) for record in records]
    return Table(LATENCY_HEADINGS, rows)


SHORT_STREAMS = ((1, 128, "full"), (8, 128, "full"), (1, 512, "mixed"))


def latency(results: Results) -> Table:
    """docs/benchmarks.md: p50 and p99 of three streams, one column per lane."""
    rows = []
    for records in comparison.by_case(results.latency).values():
        first = records[0]
        if first.model == "BERT-base" and (first.batch, first.seqlen, first.lengths) in SHORT_STREAMS:
            rows.append([requests(first), *(_short(records, suits) for suits in COLUMNS.values())])
    return Table(("requests", *(f"{lane}: p50 / p99" for lane in COLUMNS)), rows)


def _short(records: list[LatencyRecord], suits: Callable[[str], bool]) -> str:
    mine = [record for record in records if suits(record.lane)]
    timed = [(record.seconds.median, record.p99) for record in mine if record.seconds and record.p99]
    if not timed:
        return comparison.why_not(mine[0]) if mine else comparison.NOT_MEASURED
    return "{:.3g} / {:.3g} ms".format(*(seconds * 1e3 for seconds in min(timed)))


ENCODE_HEADINGS = (
    *("call of encode", "lane", "time, median [quartiles]", "p99", "sentences/s", "real tokens/s", "peak memory"),
    *("first pass", "against stock", "remark"),
)


def encoding(record: EncodeRecord) -> str:
    named = f"{record.model}, {record.pooling} pooling, {record.precision}"
    if record.sentences == 1:
        return f"{named}, single queries up to {record.longest} tokens"
    return f"{named}, {record.sentences} texts up to {record.longest} tokens, batches of {record.batch}"


def _encode_row(record: EncodeRecord, base: EncodeRecord | None) -> list[str]:
    if record.seconds is None or record.p99 is None:
        return [encoding(record), record.lane, comparison.why_not(record), *[""] * 7]
    seconds, first = record.seconds.median, record.first_pass_seconds
    return [
        encoding(record),
        record.lane,
        quartiles(record.seconds, 1e3, "ms"),
        f"{record.p99 * 1e3:.4g} ms",
        f"{record.sentences / seconds:,.0f}",
        f"{record.real_tokens / seconds:,.0f}",
        f"{record.peak_bytes / GIB:.2f} GiB" if record.peak_bytes else comparison.NOT_MEASURED,
        comparison.NOT_MEASURED if first is None else f"{first:.2f} s",
        comparison.ratio(record, base),
        record.reason or "",
    ]


def encode(results: Results) -> Table:
    """Every lane of every call of encode: sentences and real tokens per second, end to end."""
    rows = []
    for records in comparison.by_case(results.encode).values():
        rows += [_encode_row(record, comparison.baseline(records)) for record in records]
    return Table(ENCODE_HEADINGS, rows)


OP_HEADINGS = (
    "op",
    "direction",
    "type",
    "shape",
    "lane",
    "time, median [quartiles]",
    "achieved",
    "of the ceiling",
    "memory",
    "against the best peer",
)


def _op_row(record: OpRecord, peer: OpRecord | None, results: Results) -> list[str]:
    shape = f"{record.batch} x {record.seqlen} x {record.hidden}"
    extra = [f"fill {record.fill:g}"] * (record.fill < 1) + [f"p {record.p:g}"] * (record.p > 0)
    named = [record.op, record.direction, record.dtype, ", ".join([shape, *extra]), record.lane]
    if record.seconds is None:
        return [*named, comparison.why_not(record), "", "", "", ""]
    share = comparison.share(record, results.ceiling(ceilings.COPY), results.ceiling(ceilings.PRODUCT))
    return [
        *named,
        quartiles(record.seconds, 1e6, "us"),
        comparison.rate(record),
        comparison.NOT_MEASURED if share is None else f"{share:.0%}",
        comparison.NOT_MEASURED if record.peak_bytes is None else f"{record.peak_bytes / (1 << 20):,.0f} MiB",
        comparison.ratio(record, peer),
    ]


def ops(results: Results, only: Callable[[OpRecord], bool] = lambda record: True) -> Table:
    """Every lane of every op, in the directions in which its lanes compare."""
    rows = []
    shown = [r for r in results.ops if only(r) and r.direction in floors.directions_of(r.op, (r.direction,))]
    for records in comparison.by_case(shown).values():
        peer = comparison.best_peer(records)
        rows += [_op_row(record, peer, results) for record in records if record.status != "absent"]
    whole = sorted({r.op for r in shown} & set(floors.GRADIENTS_IN_FORWARD))
    note = "the forward already forms the gradients, so only forward and backward together compare with other lanes."
    return Table(OP_HEADINGS, rows, [f"{', '.join(whole)}: {note}"] if whole else [])


def ops_headline(results: Results) -> Table:
    """BERT-large's shapes in bf16 at S = 512: forward and backward, or both together where only that compares. One row for
    each of our lanes, with the best peer beside it."""

    def chosen(r: OpRecord) -> bool:
        length = r.seqlen == 512 or (r.batch, r.seqlen) == (1, 16384)  # rows of an op without sequences
        return (r.dtype, r.hidden) == ("bf16", 1024) and length and _alone_or_whole(r)

    rows = []
    for records in comparison.by_case(filter(chosen, results.ops)).values():
        peer = comparison.best_peer(records)
        beside = f"{peer.lane}, {peer.seconds.median * 1e6:,.4g} us" if peer and peer.seconds else comparison.NOT_MEASURED
        for record in records:
            if comparison.is_ours(record.lane) and record.status != "absent":
                op, direction, _, shape, lane, time, _, share, memory, ratio = _op_row(record, peer, results)
                rows.append([op, direction, shape, lane, time, share, memory, beside, ratio])
    headings = (
        *("op, bf16", "direction", "shape", "lane", "time, median [quartiles]", "of the ceiling", "memory", "best peer"),
        "against it",
    )
    return Table(headings, rows)


def _alone_or_whole(record: OpRecord) -> bool:
    return (record.direction == floors.BOTH) == (record.op in floors.GRADIENTS_IN_FORWARD)


def host(results: Results) -> Table:
    """The host's part of a step: its time against stock's, its launches, and the step's peak memory."""
    return Table(tables.HEADINGS, tables.rows(results.host))


def host_models(results: Results) -> Table:
    """`host` without the calls of encode."""
    return Table(tables.HEADINGS, tables.rows(record for record in results.host if not tables.is_encode(record)))


def host_encode(results: Results) -> Table:
    """`host` of the calls of encode."""
    return Table(tables.HEADINGS, tables.rows(filter(tables.is_encode, results.host)))


def tuning(results: Results) -> Table:
    rows = []
    for fastest, now in best(results.tuning):
        verdict = "keep the present one" if fastest is now else comparison.ratio(fastest, now)
        config = ", ".join(f"{name}={value}" for name, value in fastest.config.items())
        rows.append((*map(str, fastest.case), config, quartiles(fastest.seconds, 1e6, "us"), verdict))
    return Table(("table", "architecture", "type", "width", "fastest", "time", "lead over the present one"), rows)


def stages(results: Results) -> Table:
    """Every job that ran, and the first of the jobs not reached with their number."""
    rows = [
        (stage.name, stage.status, f"{stage.seconds:.0f} s", _last_line(stage.reason))
        for stage in results.stages
        if stage.status != NOT_REACHED
    ]
    missed = [stage for stage in results.stages if stage.status == NOT_REACHED]
    if missed:
        rows.append((f"{missed[0].name}, and {len(missed) - 1} more", NOT_REACHED, "", _last_line(missed[0].reason)))
    return Table(("job", "status", "took", "why"), rows)


def _last_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[-1]


def breakdown(results: Results) -> Table:
    """Milliseconds per step by kind of kernel."""
    records = [record for record in results.models if record.parts]
    parts = list(dict.fromkeys(part for record in records for part in record.parts))
    rows = [
        (workload(r), r.lane, *(f"{r.parts[part] * 1e3:.2f}" if part in r.parts else "" for part in parts)) for r in records
    ]
    return Table(("workload", "lane", *(f"{part}, ms" for part in parts)), rows)


def losses(results: Results) -> Table:
    """The lanes' first losses without dropout, and their largest distance from eager's (or the first lane's)."""
    rows = []
    for records in comparison.by_case(r for r in results.models if r.losses).values():
        base = next((record for record in records if record.lane == "eager"), records[0])
        for record in records:
            pairs = list(zip(record.losses, base.losses, strict=False))
            apart = max(_apart(a, b) for a, b in pairs)
            ends = f"{record.losses[0]:.4f} to {record.losses[-1]:.4f}"
            rows.append((workload(record), record.lane, str(len(pairs)), ends, f"{apart:.1e} of {base.lane}'s"))
    return Table(("workload", "lane", "steps", "loss, dropout off", "furthest apart"), rows)


def _apart(a: float, b: float) -> float:
    """The difference relative to b."""
    return abs(a - b) / abs(b) if b else math.inf if a else 0.0


# By name in a document's markers.
TABLES: dict[str, Callable[[Results], Table]] = {
    "headline": headline,
    "lanes": lanes,
    "ops-headline": ops_headline,
    "environment": environment,
    "ceilings": ceilings_table,
    "tests": tests,
    "models": models,
    "breakdown": breakdown,
    "losses": losses,
    "latency": latency,
    "latencies": latencies,
    "encode": encode,
    "ops": ops,
    "host": host,
    "host-pretended": host_models,
    "host-encode-pretended": host_encode,
    "tuning": tuning,
    "stages": stages,
}
PRETENDED = ("host-pretended", "host-encode-pretended")  # tables that a pretended GPU fills


def named(name: str, results: Results | None) -> str:
    """The named table as Markdown with its provenance below; "not measured" without results."""
    return f"{(TABLES[name](results) if results else Table()).markdown()}\n\n{literal(provenance(results))}"
