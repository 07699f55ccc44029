"""The command `python -m bench tune`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import HOUR, OUT, Budget, DryRun, Dtypes, Json, console, print_plainly, write_json
from bench.runner import session


def tune(
    kernel: Annotated[list[str], typer.Option(help="A table of kernels/core/configs.py; may be repeated.")] = [],
    dtype: Dtypes = ["bf16"],
    arch: Annotated[str | None, typer.Option(help="Without a GPU: the architecture whose candidates are audited.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Candidates per entry, the closest to the present one first.")] = 24,
    budget: Budget = HOUR,
    out: Annotated[Path, typer.Option(help="JSON file for the measured table.")] = OUT / "tune.json",
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Time the candidate configurations that pass the audit, and print the best of each entry with its lead."""
    from bench.runner.selection import tune_jobs

    jobs = tune_jobs(kernel, dtype, arch, most)
    session.start(dry_run, json)
    from bench.core import environment, schema
    from bench.core.records import Results
    from bench.report import tune_tables
    from bench.runner import gpu
    from fastbert.cli.output import progress

    results = Results(environment.read(), dry_run=dry_run)
    with progress("planning", json) as begin:
        gpu.run(jobs, results, budget, out.parent, console.print, reserve=0.0, name=out.name, begin=begin)
    schema.write(results, out)
    write_json(results, json)
    console.print(tune_tables.candidates_table(results.tuning) if dry_run else tune_tables.best_table(results.tuning))
    print_plainly(out)
