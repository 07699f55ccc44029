"""The commands `python -m bench host` and `python -m bench layer`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from bench.core.options import STDOUT, DryRun, Json, check_json, console, finite, leave_stdout_to, print_lines, write_json
from bench.runner import session

if TYPE_CHECKING:
    from bench.core.records import HostRecord, Results


def host(
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    seconds: Annotated[float, typer.Option(callback=finite, help="Seconds of timed steps per case.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns per lane.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile", help="Add a lane of torch.compile, which takes minutes.")] = False,
    names: Annotated[bool, typer.Option("--names", help="List each lane's launches by name.")] = False,
    json: Json = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a lane misses its target.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure whole steps: host time as a ratio to stock, launches and peak memory. Also runs on a pretended GPU."""
    if dry_run and check:
        raise typer.BadParameter("--check needs a measurement: leave out --dry-run")
    if seconds <= 0 or rounds < 1:
        raise typer.BadParameter(f"expected --seconds above 0 and --rounds from 1 on, got {seconds:g} and {rounds}")
    session.start(dry_run, json)
    from bench.core import environment, schema
    from bench.core.records import Results
    from bench.host.cases import CASES
    from bench.host.run import run
    from bench.report import tables
    from fastbert.cli.output import progress
    from fastbert.testing.interpreter import accelerate

    chosen = [name for name in CASES if only in name]
    if not chosen:
        raise typer.BadParameter(f"--only: no case contains {only!r}; there are {'; '.join(CASES)}")
    results = Results(environment.read(), dry_run=dry_run)
    console.print(tables.provenance(results), highlight=False, soft_wrap=True)
    if dry_run:
        accelerate()
    with progress("measuring", json) as begin:
        for done, name in enumerate(chosen):
            begin(name, done, len(chosen))
            found = list(run([name], seconds=seconds, rounds=rounds, compiled=compiled, tiny=dry_run))
            results.host += found
            print_lines(f"\n{tables.host(Results(results.environment, host=found)).markdown()}")
            if names:
                _print_names(found)
            if json and json != STDOUT:
                schema.write(results, json)  # so far: the next case may take minutes
    if json == STDOUT:
        write_json(results, json)
    bad = [record for record in results.host if record.status in ("failed", "error")]
    for record in bad:
        console.print(f"\n[red]{record.name}, {record.lane}:[/]", highlight=False)
        print_lines(record.reason or "")
    raise typer.Exit(max(_check(results) if check else 0, 1 if bad else 0))


def _print_names(records: "list[HostRecord]") -> None:
    from bench.core.comparison import by_case
    from bench.host.tables import names

    for of_case in by_case(records).values():
        for record in of_case:
            print_lines("\n".join(["", f"{record.name}, {record.lane}", *names(record)]))


def _check(results: "Results") -> int:
    from bench.host import targets

    missed, count = targets.check(results.host)
    console.print()
    for line in missed:
        console.print(f"[red]missed:[/] {line}", highlight=False, soft_wrap=True)
    console.print(f"{count - len(missed)} of {count} targets reached")
    return 1 if missed else 0


def layer(json: Json = None) -> None:
    """Count what a BERT-base layer in training launches and the bytes that it moves. Needs no GPU and runs nothing."""
    leave_stdout_to(json)
    check_json(json)
    from bench.host.layer_traffic import SHAPES, of_layer, table
    from fastbert.cli.output import progress

    with progress("counting", json):
        counted = [of_layer(*shape) for shape in SHAPES]
    console.print(table(counted))
    found = [{"rows": rows, "tokens": tokens} | asdict(one) for (rows, tokens), one in zip(SHAPES, counted, strict=True)]
    write_json(found, json)
