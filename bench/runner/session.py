"""Shared by the measuring commands: their start, and the way from a plan to results, report and exit status."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bench.core.options import check_json, console, leave_stdout_to, print_plainly, write_json

if TYPE_CHECKING:
    from bench.core.records import Results, SuiteRecord
    from bench.runner.plan import Job


def start(dry_run: bool, json: Path | None = None) -> None:
    """Select the interpreter for a dry run. Without a GPU and without a dry run, print the floors and exit with 3."""
    import torch

    if dry_run:  # before fastbert imports triton; child processes see no GPU
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    leave_stdout_to(json)

    from bench.audit.no_gpu import explain

    if dry_run:
        console.print("[yellow]dry run: tiny shapes, no time is taken[/]")
    elif not torch.cuda.is_available():
        raise typer.Exit(explain(console))
    check_json(json)


def run(
    plan: "Iterable[Job]",
    dry_run: bool,
    budget: float,
    out: Path,
    commit: str | None = None,
    tests: "SuiteRecord | None" = None,
    json: Path | None = None,
) -> None:
    """Run a plan, write results and report into `out`, and exit with 1 if a check failed or nothing was reached.

    A signal stops the running job; the results so far are written, without the pictures. `tests`: the record of an earlier
    test run.
    """
    from bench.core import environment, schema
    from bench.core.records import Results
    from bench.report import files
    from bench.runner import gpu, isolate, stop
    from fastbert.cli.output import progress

    start = time.monotonic()
    with stop.listening():
        isolate.SERVER.begin()  # it imports while the environment is read
        results = Results(environment.read(commit), dry_run=dry_run, tests=tests)
        left = budget - (time.monotonic() - start)
        with progress("planning", json) as begin:
            after = lambda: files.write_markdown(results, out)  # noqa: E731
            gpu.run(plan, results, left, out, console.print, after=after, begin=begin)
        write = files.write_markdown if stop.reason() else files.write_page
        gpu.record("report", lambda: write(results, out), results)
        schema.write(results, out / gpu.RESULTS)
        write_json(results, json)
        for path in sorted(out.iterdir()):
            print_plainly(f"{path}  {path.stat().st_size / 1024:.0f} KiB")
        status = conclude(results)
        if stop.reason():
            console.print(f"[red]{stop.reason()}[/]")
        if status or stop.status():
            raise typer.Exit(stop.status() or status)


def conclude(results: "Results") -> int:
    """Print what failed; returns the exit status."""
    from bench.runner import acceptance

    for line in acceptance.failures(results):
        console.print(line, highlight=False, soft_wrap=True, markup=False, style="red")
    if any(record.op == "feed_forward" and record.seconds for record in results.ops):
        from bench.ops import feed_forward_lanes
        from bench.tune import candidates

        console.print(feed_forward_lanes.earned_table(results.ops, candidates.architecture_here()))
    reached = [stage for stage in results.stages if stage.status == "ok"]
    console.print(f"{len(reached)} of {len(results.stages)} jobs done")
    found = (*results.models, *results.latency, *results.encode, *results.ops, *results.host)
    tests = results.tests
    wrong = any(record.status == "failed" for record in found) or (tests and tests.failed + tests.errors)
    return 1 if wrong or not (found or tests or results.tuning or results.ceilings) else 0
