"""Runs a plan within a time budget, and writes everything reached after each job."""

import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from bench import schema
from bench.plan import Job
from bench.records import Results, StageRecord

RESULTS = "results.json"
RESERVE = 25.0  # seconds kept for the report at the end


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

    A job that fails is recorded with the end of its output, and the next one runs. One that does not fit into the time
    left is recorded as not reached. `after` runs after each job, with its records in `results`.
    """
    end = time.monotonic() + budget - reserve
    schema.write(results, out / name)
    for job in plan:
        left = end - time.monotonic()
        if left < job.least:
            results.stages.append(StageRecord(job.name, "not reached", 0.0, f"{max(left, 0.0):.0f} s were left"))
            continue
        stage = _run(job, min(job.cap, left), results)
        results.stages.append(stage)
        schema.write(results, out / name)
        record("report so far", after, results, only_failures=True)
        say(f"{stage.seconds:6.1f} s  {stage.status:5}  {stage.name}")
    schema.write(results, out / name)


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
