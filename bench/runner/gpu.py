"""Runs a plan within a time budget, and writes everything reached after each job."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.core import schema
from bench.core.records import NOT_REACHED, Results, StageRecord
from bench.runner import stop
from bench.runner.plan import Job

RESULTS = "results.json"
RESERVE = 15.0  # seconds kept for the report at the end
OVERRUN = 15.0  # by which a job may outlast its stage, so that what it has begun is not lost for some seconds


def run(
    plan: Iterable[Job],
    results: Results,
    budget: float,
    out: Path,
    say: Callable[[str], None],
    reserve: float = RESERVE,
    name: str = RESULTS,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Run the jobs in order until `budget` seconds have gone; `results` and out/`name` hold what they gave.

    A job that does not fit into the share of the time that is its stage's waits until all stages have had theirs. One that
    fails is recorded with the end of its output, and the next one runs. One that does not fit into the time left at all is
    recorded as not reached; so are all others once the end is asked for (bench.runner.stop). `after` runs after each job, with
    its records in `results`.
    """
    begin = time.monotonic()
    schema.write(results, out / name)
    for job, left in _in_time(plan, begin, budget - reserve):
        if left < job.least or stop.reason():
            why = stop.reason() or f"{max(left, 0.0):.0f} s were left"
            results.stages.append(StageRecord(job.name, NOT_REACHED, 0.0, why))
            continue
        stage = _run(job, min(job.cap, left), results)
        results.stages.append(stage)
        schema.write(results, out / name)
        record("report so far", after, results, only_failures=True)
        say(f"{time.monotonic() - begin:6.1f} s  {stage.seconds:6.1f} s  {stage.status:5}  {stage.name}")
    schema.write(results, out / name)


def _in_time(plan: Iterable[Job], begin: float, seconds: float) -> Iterator[tuple[Job, float]]:
    """Each job once, with the time it may take: that of its stage and OVERRUN; what was left out follows when all stages have
    had theirs, and after it what belongs to no stage."""

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
    """Run `call` as a stage: an exception in it is recorded and ends nothing."""
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
