"""What `python -m bench host` does once it is settled whether this is a dry run."""

from pathlib import Path

import typer
from rich.console import Console

from bench.core import environment, schema
from bench.core.comparison import by_case
from bench.core.records import HostRecord, Results
from bench.host import run as host
from bench.host import tables as host_tables
from bench.host import targets as host_targets
from bench.host.cases import CASES
from bench.report import markdown
from fastbert.testing.interpreter import hurry


def run(
    console: Console,
    only: str,
    seconds: float,
    rounds: int,
    compiled: bool,
    names: bool,
    path: Path | None,
    check: bool,
    dry_run: bool,
) -> int:
    """Measure the cases, print a table after each; returns the exit status.

    Raises:
        typer.BadParameter: no case is called so.
    """
    chosen = [name for name in CASES if only in name]
    if not chosen:
        raise typer.BadParameter(f"--only: no case contains {only!r}; there are {'; '.join(CASES)}")
    results = Results(environment.read(), dry_run=dry_run)
    console.print(markdown.provenance(results), highlight=False, soft_wrap=True)
    if dry_run:
        hurry()
    for name in chosen:
        found = list(host.run([name], seconds=seconds, rounds=rounds, compiled=compiled, tiny=dry_run))
        results.host += found
        typer.echo(f"\n{markdown.host(Results(results.environment, host=found))}")
        if names:
            _print_names(found)
        if path:
            schema.write(results, path)
    bad = [record for record in results.host if record.status in ("failed", "error")]
    for record in bad:
        console.print(f"\n[red]{record.name}, {record.lane}:[/]", highlight=False)
        typer.echo(record.reason)
    return max(_check(console, results) if check else 0, 1 if bad else 0)


def _print_names(records: list[HostRecord]) -> None:
    for of_case in by_case(records).values():
        for record in of_case:
            typer.echo("\n".join(["", f"{record.name}, {record.lane}", *host_tables.names(record)]))


def _check(console: Console, results: Results) -> int:
    missed, count = host_targets.check(results.host)
    console.print()
    for line in missed:
        console.print(f"[red]missed:[/] {line}", highlight=False, soft_wrap=True)
    console.print(f"{count - len(missed)} of {count} targets reached")
    return 1 if missed else 0
