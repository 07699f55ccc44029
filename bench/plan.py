"""What `python -m bench gpu` does, most important first: a list of jobs, each with the most time it may take."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from bench import host_cases, models, ops, suite
from bench.isolate import Outcome, run_job
from bench.models import Workload

FIRST_LANES = ("fastbert", "stock", "fastbert, packed, no logits")
SECOND_LANES = ("stock + compile", "fastbert + compile")
OTHER_LANES = ("fastbert, packed", "fastbert, padded", "fastbert + its AdamW", "eager", "flash_attention_2")
CASES_A_JOB = 8
TESTS_SHARE = 0.3  # of the budget, for the correctness tests


@dataclass(frozen=True)
class Job:
    """run(timeout) in at most `cap` seconds; not begun where fewer than `least` are left."""

    name: str
    run: Callable[[float], Outcome]
    cap: float
    least: float = 10.0


def worker_job(name: str, cap: float, least: float = 10.0, **job: Any) -> Job:
    return Job(name, partial(run_job, job), cap, least)


def model_job(workload: Workload, lane: str, details: bool) -> Job:
    size = f"B={workload.batch} S={workload.seqlen} fill={workload.fill}"
    compiles = models.LANES[lane].compiled
    return worker_job(
        f"model: {workload.model} {workload.head} {workload.mode} {size}, {lane}",
        240.0 if compiles else 90.0,
        60.0 if compiles else 20.0,
        kind="model",
        workloads=[workload.to_json()],
        lanes=[lane],
        details=details,
    )


def op_jobs(cases: list[ops.Case], directions: tuple[str, ...] = ops.DIRECTIONS) -> Iterator[Job]:
    for i in range(0, len(cases), CASES_A_JOB):
        some = cases[i : i + CASES_A_JOB]
        name = f"ops: {some[0].dtype} S={some[0].seqlen} H={some[0].hidden}, {len(some)} cases"
        yield worker_job(name, 200.0, 30.0, kind="ops", cases=[asdict(case) for case in some], directions=list(directions))


def ceilings_job() -> Job:
    return worker_job("ceilings", 60.0, kind="ceilings")


def optimizer_job(*names: str) -> Job:
    return worker_job(f"ops: adamw of {', '.join(names)}", 60.0, kind="optimizers", models=list(names))


HOST_CAP = 45.0


def host_job() -> Job:
    """The host's share of as many steps as fit, the most telling ones first; the last of them may still be under way."""
    names = list(host_cases.CASES)
    return worker_job("host", HOST_CAP, 25.0, kind="host", names=names, seconds=1.2, rounds=4, budget=0.6 * HOST_CAP)


def gpu_plan(budget: float) -> Iterator[Job]:
    """Everything, each thing once. The lanes that decide come before those that complete the picture."""
    names = set()
    for job in _everything(budget):
        if job.name not in names:
            names.add(job.name)
            yield job


def _everything(budget: float) -> Iterator[Job]:
    from bench.candidates import tune_jobs

    yield ceilings_job()
    yield Job("tests: pytest -m gpu", suite.run, TESTS_SHARE * budget)
    yield host_job()
    workloads = list(models.headline())
    for lanes in (FIRST_LANES, SECOND_LANES, OTHER_LANES):
        for workload in workloads:
            for lane in lanes:
                if models.LANES[lane].suits(workload):
                    yield model_job(workload, lane, details=workload.mode == "train")
    yield from op_jobs(list(ops.cases(dtypes=("bf16",))))
    yield optimizer_job("BERT-base", "BERT-large")
    for job in tune_jobs("sm_90"):
        yield worker_job(f"tune: {job['kernel']} {job['dtype']} {job['width']}", 120.0, 30.0, kind="tune", **job)
    for workload in models.scaling():
        for lane in FIRST_LANES:
            if models.LANES[lane].suits(workload):
                yield model_job(workload, lane, details=False)
    for workload in models.grid():
        for lane in FIRST_LANES:
            if models.LANES[lane].suits(workload):
                yield model_job(workload, lane, details=False)
    yield from op_jobs(list(ops.cases(dtypes=("fp16", "fp32"))))


def dry_plan() -> Iterator[Job]:
    """The same kinds of job on tiny shapes in Triton's interpreter; nothing is timed."""
    from bench.candidates import tune_jobs

    training = models.tiny(Workload("tiny", "mlm", "train", 4, 16, 0.5))
    inference = replace(training, head="classification", mode="infer", fill=1.0)
    yield Job("tests: pytest -m gpu", partial(suite.run, selection=("-m", "gpu", "tests/kernels/test_gpu.py")), 120.0)
    for workload, lane in (
        (training, "fastbert"),
        (training, "stock"),
        (training, "fastbert, packed, no logits"),
        (inference, "fastbert"),
    ):
        yield model_job(workload, lane, details=True)
    yield worker_job("ops", 120.0, kind="ops", cases=[asdict(c) for c in ops.tiny_cases()], directions=["both"])
    yield optimizer_job("tiny")
    yield worker_job("host", 120.0, kind="host", names=[host_cases.TRAINING.name], tiny=True)
    job = next(tune_jobs("sm_90"))
    yield worker_job("tune: the first", 120.0, kind="tune", **job | {"most": 2})
