"""The command `python -m bench ops`."""

from typing import Annotated

import typer

from bench.core.options import HOUR, OUT, Budget, DryRun, Dtypes, Json, Out
from bench.runner import session


def ops(
    op: Annotated[list[str], typer.Option(help="Only this op; may be repeated.")] = [],
    dtype: Dtypes = ["bf16"],
    budget: Budget = HOUR,
    out: Out = OUT,
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Time every op beside its peers, on the grid of `pytest bench` but without the host's part of a call."""
    from bench.runner.selection import op_jobs

    jobs = op_jobs(op, dtype, dry_run)
    session.start(dry_run, json)
    session.run(jobs, dry_run, budget, out, json=json)
