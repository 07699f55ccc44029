"""Plans `python -m bench gpu`: a list of jobs, most important first, each with a time limit.

Each stage has a share of the budget and gets the time that earlier stages leave. Jobs that do not fit into their stage run
after the last one (bench.runner.gpu).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from bench.encode import cases as encoding
from bench.encode.cases import EncodeCase
from bench.host.cases import CASES, TRAINING
from bench.models import latency, workloads
from bench.models.workloads import Workload
from bench.ops import grid
from bench.runner import suite
from bench.runner.isolate import Background, Outcome, run_job

HEADLINE_LANES = ("fastbert", "stock", workloads.GRAPHED, workloads.GRAPHED_STEP)
DETAILED_LANES = HEADLINE_LANES[:2]
FIRST_LANES = (*HEADLINE_LANES, "fastbert, packed, no logits")
PEERS = ("flattened",)
# Other libraries, which say in a second or two why they cannot run, or take their seconds.
LIBRARIES = (workloads.FLATTENED_FLASH, workloads.PACKED_ENCODERS, workloads.LIGER)
COMPILED_LANES = ("stock + compile", "stock + reduce-overhead")
TUNED_LANES = latency.TUNED_LANES
OUR_LANES = ("fastbert, packed", "fastbert, padded", "fastbert + its AdamW", "fastbert + compile")
OTHER_LANES = (*OUR_LANES, "eager", workloads.FLASH_ATTENTION_2)
CASES_A_JOB = 8
QUICK_LANES = ("fastbert", "fastbert packed", "sdpa flash", "sdpa efficient", "sdpa cudnn", "fused", "eager")
COMPILERS = 4  # compiler processes per job that fills caches
TESTS = 0.25  # share of the budget for the correctness tests
SHORT = 300.0  # seconds; a smaller budget has no stages and fills no caches ahead
ALWAYS = float("-inf")  # `least` of a job that always runs: the processes that it ends would disturb all timing


@dataclass(frozen=True)
class Job:
    """run(timeout) takes at most `cap` seconds and does not start with fewer than `least` left. until: the share of the
    budget by which its stage must end; None for a job without a stage."""

    name: str
    run: Callable[[float], Outcome]
    cap: float
    least: float = 10.0
    until: float | None = None


def worker_job(name: str, cap: float, least: float = 10.0, **job: Any) -> Job:
    return Job(name, partial(run_job, job), cap, least)


def _described(workload: Workload) -> str:
    size = f"B={workload.batch} S={workload.seqlen} fill={workload.fill}"
    return f"{workload.model} {workload.head} {workload.mode} {size}"


def model_job(workload: Workload, lane: str, details: bool, cold: bool = True) -> Job:
    cap, least = _cost(lane)
    return worker_job(
        f"model: {_described(workload)}, {lane}{'' if cold else ' (warm)'}",
        cap,
        least,
        kind="model",
        workloads=[workload.to_json()],
        lanes=[lane],
        details=[lane] * details,
        cold=cold,
    )


def _cost(lane: str) -> tuple[float, float]:
    """The longest time of a job of this lane, and the least that lets it start. max-autotune compiles for minutes."""
    if lane in TUNED_LANES:
        return 420.0, 60.0
    return (240.0, 20.0) if workloads.LANES[lane].compiled else (90.0, 12.0)


def model_jobs(chosen: Iterable[Workload], lanes: tuple[str, ...], details: bool = False) -> Iterator[Job]:
    """Jobs that share the run's caches. Compiled lanes get no details, because these would compile again."""
    for workload in chosen:
        for lane in lanes:
            if workloads.LANES[lane].suits(workload):
                more = details and workload.mode == "train" and not workloads.LANES[lane].compiled
                yield model_job(workload, lane, details=more, cold=False)


def headline_jobs(chosen: Iterable[Workload]) -> Iterator[Job]:
    """One job per workload: its lanes share the start of a process on the GPU, which takes some five seconds."""
    for workload in chosen:
        lanes = [lane for lane in HEADLINE_LANES if workloads.LANES[lane].suits(workload)]
        details = list(DETAILED_LANES) if workload.mode == "train" else []
        job = {"kind": "model", "workloads": [workload.to_json()], "lanes": lanes, "details": details}
        name = f"model: {_described(workload)}, {' and '.join(lanes)} (warm)"
        yield Job(name, partial(run_lanes, job | {"cold": False}), 120.0, 15.0)


def library_jobs(chosen: Iterable[Workload]) -> Iterator[Job]:
    """One job per workload: where a library is missing its lane takes no more than the start of the process."""
    for workload in chosen:
        job = {"kind": "model", "workloads": [workload.to_json()], "lanes": list(LIBRARIES), "details": [], "cold": False}
        yield Job(f"model: {_described(workload)}, {' and '.join(LIBRARIES)}", partial(run_lanes, job), 90.0, 12.0)


def run_lanes(job: dict[str, Any], timeout: float) -> Outcome:
    """Run a job of several lanes. If its process fails, the lanes that have no record yet get a new one, without the first of
    them if it fails again."""
    records: list[Any] = []
    left, seconds, reason = list(job["lanes"]), 0.0, None
    while left:
        outcome = run_job(job | {"lanes": left}, timeout - seconds)
        records += outcome.records
        seconds += outcome.seconds
        if outcome.status == "ok" or outcome.timed_out:
            reason = reason or outcome.reason
            break
        reason = reason or outcome.reason
        missing = [lane for lane in left if lane not in {record.lane for record in records}]
        left = missing if len(missing) < len(left) else missing[1:]
    return Outcome("error" if reason else "ok", seconds, reason, records)


def latency_job(
    streams: list[Workload],
    lanes: tuple[str, ...],
    seconds: float = 1.0,
    budget: float | None = None,
    cap: float = 300.0,
    least: float = 15.0,
) -> Job:
    """Streams that share a process, and models where a lane compiles nothing. No stream starts after `budget` seconds."""
    sizes = ", ".join(f"{w.batch}x{w.seqlen}{'' if w.fill == 1.0 else ' mixed'}" for w in streams)
    name = f"latency: {streams[0].model} {streams[0].head} {sizes}, {' and '.join(lanes)}"
    job: dict[str, Any] = {"streams": [workload.to_json() for workload in streams], "lanes": list(lanes), "seconds": seconds}
    return worker_job(name, cap, least, kind="latency", **job | ({"budget": budget} if budget else {}))


def encode_job(
    cases: list[EncodeCase], lanes: tuple[str, ...] | None = None, seconds: float = 1.0, budget: float | None = None
) -> Job:
    """Calls of encode that share a process; all lanes that suit a case, or those of them that are named. No case starts after
    `budget` seconds."""
    first = cases[0]
    sizes = ", ".join("queries" if case.single else f"{case.sentences} by {case.batch}" for case in cases)
    named = f", {' and '.join(lanes)}" if lanes else ""
    name = f"encode: {first.model} {first.pooling} {first.precision} {sizes}{named}"
    job: dict[str, Any] = {"cases": [case.to_json() for case in cases], "lanes": lanes and list(lanes), "seconds": seconds}
    return worker_job(name, 240.0, 20.0, kind="encode", **job | ({"budget": budget} if budget else {}))


def op_jobs(
    cases: list[grid.Case], directions: tuple[str, ...] = grid.DIRECTIONS, lanes: tuple[str, ...] | None = None
) -> Iterator[Job]:
    for i in range(0, len(cases), CASES_A_JOB):
        some = cases[i : i + CASES_A_JOB]
        quick = " (quick lanes)" if lanes else ""
        name = f"ops: {some[0].dtype} S={some[0].seqlen} H={some[0].hidden}, {len(some)} cases{quick}"
        job: dict[str, Any] = {"cases": [asdict(case) for case in some], "directions": list(directions)}
        yield worker_job(name, 200.0, 20.0, kind="ops", lanes=lanes and list(lanes), **job)


def ceilings_job() -> Job:
    return worker_job("ceilings", 30.0, kind="ceilings")


def optimizer_job(*names: str) -> Job:
    return worker_job(f"ops: adamw of {', '.join(names)}", 60.0, kind="optimizers", models=list(names))


def host_job() -> Job:
    """Host measurements of as many cases as fit, most important first. The budget leaves time to finish the last one."""
    names = list(CASES)
    return worker_job("host", 45.0, 20.0, kind="host", names=names, seconds=1.0, rounds=4, budget=25.0)


def preparation() -> Background:
    """One process per workload that fills the caches during the tests, which use few cores and time nothing."""
    jobs = []
    for workload in workloads.headline():
        ours = [lane for lane in HEADLINE_LANES if lane != "stock" and workloads.LANES[lane].suits(workload)]
        jobs.append({"kind": "prepare", "workload": workload.to_json(), "lanes": [*ours, *COMPILED_LANES]})
    return Background(jobs, {"TORCHINDUCTOR_COMPILE_THREADS": str(COMPILERS)})


def stages(budget: float, tests: bool = True) -> list[tuple[float, Callable[[], Iterator[Job]]]]:
    """Each stage's share of the budget and its jobs, most important first. `tests`: False if they have run before."""
    return [
        (0.05, _ceilings),
        (TESTS, partial(_tests, tests, budget)),
        (0.16, _headline),
        (0.07, _latency),
        (0.05, _encode),
        (0.08, _host),
        (0.13, _ops),
        (0.15, _compiled),
        (0.06, _tuning),
    ]


def gpu_plan(budget: float, tests: bool = True) -> Iterator[Job]:
    """All jobs, each once: those of the stages, then the rest. With a short budget there are no stages, only this order."""
    parts = stages(budget, tests)
    ends = accumulate(share for share, _ in parts)
    staged = (replace(job, until=min(end, 1.0)) for (_, jobs), end in zip(parts, ends, strict=True) for job in jobs())
    seen = set()
    for job in (*staged, *_rest()):
        if job.name not in seen:
            seen.add(job.name)
            yield job if budget >= SHORT else replace(job, until=None)


def _ceilings() -> Iterator[Job]:
    yield ceilings_job()


def _tests(tests: bool, budget: float) -> Iterator[Job]:
    background = preparation()
    if budget >= SHORT:
        yield Job("caches: begun", background.begin, 10.0, 0.0)
    if tests:
        yield Job("tests: pytest -m gpu", suite.run, TESTS * budget)
    if budget >= SHORT:
        yield Job("caches: filled", background.finish, 60.0, ALWAYS)


def _headline() -> Iterator[Job]:
    yield from headline_jobs(workloads.headline())


def _first_streams() -> list[Workload]:
    """Those of the table in docs/benchmarks.md, then the other single rows."""
    first = workloads.of_the_page()
    return [*first, *(w for w in workloads.requests() if w.batch == 1 and w not in first)]


def _latency() -> Iterator[Job]:
    yield latency_job(_first_streams(), latency.FIRST_LANES, budget=30.0)


def _encode() -> Iterator[Job]:
    """Mean pooling in bf16 first by the most usual batch size, then single queries."""
    first, *_, queries = encoding.cases(batches=(32,))
    yield encode_job([first], encoding.FIRST_LANES)
    yield encode_job([queries])


def _compiled() -> Iterator[Job]:
    """Latency of batches, our other lane and the peer; then compiled lanes, for small batches reduce-overhead first."""
    first = _first_streams()
    yield latency_job([w for w in workloads.requests() if w not in first], latency.FIRST_LANES, budget=30.0)
    mlm, *small = workloads.headline()
    yield from model_jobs([mlm, *small], (*FIRST_LANES[len(HEADLINE_LANES) :], *PEERS), details=True)
    yield from library_jobs([mlm, *small])
    yield from model_jobs(reversed(small), COMPILED_LANES[::-1])
    yield from model_jobs([mlm], COMPILED_LANES)
    for workload in workloads.of_the_page():
        yield latency_job([workload], latency.COMPILED_LANES)
    yield from model_jobs(small[-1:], TUNED_LANES)


def _host() -> Iterator[Job]:
    yield host_job()


def _ops() -> Iterator[Job]:
    """The shapes of the table in docs/benchmarks.md and of the fine-tuning step, with the peers that need no compilation."""
    for seqlen, hidden in ((512, 1024), (128, 768)):
        cases = [case for case in grid.cases(dtypes=("bf16",)) if case.hidden == hidden and _length(case) == seqlen]
        yield from op_jobs(cases, ("forward", "backward"), QUICK_LANES)
    yield optimizer_job("BERT-base", "BERT-large")


def _length(case: grid.Case) -> int:
    """The sequence length that a case represents; a case of linear_cross_entropy has its number of rows in that field."""
    return next((length for length, rows in grid.LABELLED.items() if (case.batch, case.seqlen) == (1, rows)), case.seqlen)


# Of these only the promising candidates are timed early; the search over all choices comes last.
GENERAL_SEARCH = (
    *("attention_forward", "attention_backward_kv", "attention_backward_q", "bias_gelu_forward", "bias_gelu_backward"),
    *("layernorm_forward", "layernorm_backward", "gelu_layernorm_backward", "gather_rows", "linear_cross_entropy"),
    *("embedding_runs", "embedding_sums_backward", "pool_rows_forward", "pool_rows_backward"),
)


def _tuning() -> Iterator[Job]:
    from bench.tune.candidates import ENTRIES

    for kernel, entry in ENTRIES.items():
        if entry.promising:
            yield _tune_job(f"tune: named {kernel}", kernel, entry.widths[0], configs=list(entry.promising))
    for kernel in ENTRIES:
        if kernel not in GENERAL_SEARCH:
            yield _tune_job(f"tune: {kernel} bf16 {ENTRIES[kernel].widths[0]}", kernel, ENTRIES[kernel].widths[0])


def _tune_job(name: str, kernel: str, width: int, **job: Any) -> Job:
    job |= {"kernel": kernel, "architecture": "sm_90", "dtype": "bf16", "width": width}
    return worker_job(name, 60.0, 15.0, kind="tune", **job)


def _rest() -> Iterator[Job]:
    from bench.tune.candidates import tune_jobs

    first, *others = workloads.headline()
    yield from model_jobs(workloads.wider(), FIRST_LANES, details=True)
    yield from model_jobs(workloads.wider(), COMPILED_LANES[:1])
    yield from model_jobs([first, *others, *workloads.wider()], PEERS + OTHER_LANES)
    for workload in workloads.requests():
        yield latency_job([workload], latency.LANES[len(latency.FIRST_LANES) : -len(latency.TUNED_LANES)])
    yield from _other_encoders()
    yield from model_jobs([*others[::-1], first], TUNED_LANES)
    yield latency_job(workloads.of_the_page()[:1], latency.TUNED_LANES, cap=420.0, least=60.0)
    for lane in ("fastbert", "stock + compile"):
        yield model_job(first, lane, details=not workloads.LANES[lane].compiled, cold=True)
    yield from op_jobs(list(grid.cases(dtypes=("bf16",))))
    for job in tune_jobs("sm_90"):
        yield worker_job(f"tune: {job['kernel']} {job['dtype']} {job['width']}", 120.0, 30.0, kind="tune", **job)
    for chosen in (workloads.scaling(), workloads.grid()):
        yield from model_jobs(chosen, FIRST_LANES)
    yield from op_jobs(list(grid.cases(dtypes=("fp16", "fp32"))))


def _other_encoders() -> Iterator[Job]:
    """Other batch sizes, poolings, precisions and models; the lanes that the first job left out."""
    for case in encoding.cases(queries=False):
        yield encode_job([case])
    for model, pooling, precision in (
        *(("BERT-base", "cls", "bf16"), ("MiniLM", "mean", "bf16"), ("XLM-R base", "mean", "bf16")),
        *(("BERT-base", "mean", "fp16"), ("BERT-base", "mean", "fp32")),
    ):
        for case in encoding.cases((model,), (pooling,), (precision,)):
            yield encode_job([case])


def dry_plan() -> Iterator[Job]:
    """The same kinds of job on tiny shapes in Triton's interpreter; nothing is timed."""
    from bench.tune.candidates import tune_jobs

    training = workloads.tiny(Workload("tiny", "mlm", "train", 4, 16, 0.5))
    inference = replace(training, head="classification", mode="infer", fill=1.0)
    yield Job("tests: pytest -m gpu", partial(suite.run, chosen=("tests/kernels/test_gpu.py",)), 120.0)
    for workload, lane in (
        (training, "fastbert"),
        (training, "stock"),
        (training, "flattened"),
        (training, "fastbert, packed, no logits"),
        (inference, "fastbert"),
        (inference, workloads.MAX_AUTOTUNE),
    ):
        yield model_job(workload, lane, details=True)
    yield from library_jobs([training])
    yield latency_job([inference, replace(inference, fill=0.5)], latency.FIRST_LANES)
    yield encode_job([encoding.tiny(case) for case in encoding.cases(batches=(32,))])
    yield worker_job("ops", 120.0, kind="ops", cases=[asdict(c) for c in grid.tiny_cases()], directions=["both"], lanes=None)
    yield optimizer_job("tiny")
    yield worker_job("host", 120.0, kind="host", names=[TRAINING.name], tiny=True)
    job = next(tune_jobs("sm_90"))
    yield worker_job("tune: the first", 120.0, kind="tune", **job | {"most": 2})
