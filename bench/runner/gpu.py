"""Runs a plan within a time budget and writes all results so far after each job."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.core import schema
from bench.core.records import NOT_REACHED, Results, StageRecord
from bench.runner import stop
from bench.runner.plan import Job

RESULTS = "results.json"
RESERVE = 15.0  # seconds reserved for the report at the end
OVERRUN = 15.0  # seconds by which a running job may overrun its stage, so that its work is not lost


def run(
    plan: Iterable[Job],
    results: Results,
    budget: float,
    out: Path,
    say: Callable[[str], None],
    reserve: float = RESERVE,
    name: str = RESULTS,
    after: Callable[[], object] = lambda: None,
    begin: Callable[[str], object] = lambda name: None,
) -> None:
    """Run the jobs in order until `budget` seconds have passed. Their records go into `results` and out/`name`.

    A job that does not fit into the rest of its stage waits until after the last stage. A job that fails is recorded with
    the end of its output, and the next one runs. A job that does not fit into the remaining time is recorded as not
    reached, and so are all jobs after a request to stop (bench.runner.stop). `after` runs after each job, when the job's
    records are in `results`; `begin` is told the name of the job that begins.
    """
    start = time.monotonic()
    schema.write(results, out / name)
    for job, left in _in_time(plan, start, budget - reserve):
        if left < job.least or stop.reason():
            why = stop.reason() or f"{max(left, 0.0):.0f} s were left"
            results.stages.append(StageRecord(job.name, NOT_REACHED, 0.0, why))
            continue
        begin(job.name)
        stage = _run(job, min(job.cap, left), results)
        results.stages.append(stage)
        schema.write(results, out / name)
        record("report so far", after, results, only_failures=True)
        say(f"{time.monotonic() - start:6.1f} s  {stage.seconds:6.1f} s  {stage.status:5}  {stage.name}")
    schema.write(results, out / name)


def _in_time(plan: Iterable[Job], begin: float, seconds: float) -> Iterator[tuple[Job, float]]:
    """Yield each job once with its time limit: the rest of its stage plus OVERRUN. Jobs that did not fit into their stage
    follow after the last stage, then the jobs without a stage."""

    def left(share: float) -> float:
        return begin + share * seconds - time.monotonic()

    later: list[Job] = []
    for job in plan:
        if job.until is None:
            yield from ((one, left(1.0)) for one in later)
            later = []
            yield job, left(1.0)
        elif left(job.until) < job.least:
            later.append(job)
        else:
            yield job, min(left(job.until) + OVERRUN, left(1.0))
    yield from ((one, left(1.0)) for one in later)


def record(name: str, call: Callable[[], object], results: Results, only_failures: bool = False) -> None:
    """Run `call` as a stage. An exception is recorded and does not end the run."""
    start = time.monotonic()
    try:
        call()
    except Exception:
        results.stages.append(StageRecord(name, "error", time.monotonic() - start, traceback.format_exc()))
    else:
        if not only_failures:
            results.stages.append(StageRecord(name, "ok", time.monotonic() - start, None))


def _run(job: Job, timeout: float, results: Results) -> StageRecord:
    start = time.monotonic()
    try:
        outcome = job.run(timeout)
        schema.add(results, outcome.records)
    except Exception:
        return StageRecord(job.name, "error", time.monotonic() - start, traceback.format_exc())
    return StageRecord(job.name, outcome.status, time.monotonic() - start, outcome.reason)
