"""The command `python -m bench audit`."""

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from bench.core.options import WORKERS, Json, check_json, console, leave_stdout_to, write_json

if TYPE_CHECKING:
    from bench.audit.run import Record


def audit(
    op: Annotated[list[str], typer.Option(help="Only this op; may be repeated.")] = [],
    arch: Annotated[list[str], typer.Option(help="Only this architecture; may be repeated.")] = [],
    json: Json = None,
    short: Annotated[bool, typer.Option("--short", help="Only BERT-base in bf16, as .ci/run does.")] = False,
    check: Annotated[bool, typer.Option(help="Exit with 1 if anything is worse than the baseline.")] = False,
    update: Annotated[bool, typer.Option(help="Accept the records as the new baseline.")] = False,
    top: Annotated[int, typer.Option(min=0, help="Rows of the table; 0 for all.")] = 40,
    workers: Annotated[int, typer.Option(min=1, max=WORKERS, help="Compiler processes.")] = 2,
) -> None:
    """Compile every op x configuration x architecture and inspect the machine code. Needs no GPU and times nothing."""
    leave_stdout_to(json)
    check_json(json)
    from bench.audit.run import WHOLE, baseline, merge, read, release, run, write
    from bench.audit.tables import audit_table, floor_table
    from fastbert.cli.output import progress

    triton = release()
    if update and short is (triton == WHOLE):
        raise typer.BadParameter(f"--update needs a full run under triton {WHOLE}, and --short under any other release")
    if check and not baseline(triton).exists():
        raise typer.BadParameter(f"there is no accepted state for triton {triton}; --short --update creates one")
    ops, architectures = _select(op, arch)
    with progress("compiling", json) as begin:
        records = run(ops, architectures, workers, partial(begin, "compiling"), short)
    console.print(audit_table(records, top or len(records)))
    console.print(floor_table(ops))
    write_json({"records": records}, json)
    if check:
        _check(records, ops, architectures, short)
    if update:
        path = baseline(triton)
        write(merge(read(triton) if path.exists() else [], records, ops, architectures), path)
        console.print(f"{len(records)} records accepted into {path}")


def _select(names: list[str], architectures: list[str]) -> tuple[list[str], list[str]]:
    from bench.audit.run import ARCHITECTURES, ops, selection

    try:
        return selection(names, architectures)
    except KeyError as error:
        known = ", ".join([*ops(), *ARCHITECTURES])
        raise typer.BadParameter(f"{error.args[0]} is unknown; known are {known}") from None


def _check(records: "list[Record]", ops: list[str], architectures: list[str], short: bool) -> None:
    from bench.audit.run import compare, read, release, selected

    problems = compare(selected(read(release()), ops, architectures, short), records)
    for problem in problems:
        console.print(f"[red]worse:[/] {problem}", highlight=False)
    if problems:
        console.print("If this is intended: python -m bench audit --update, and give the reason in bench/LOG.md.")
        raise typer.Exit(1)
    console.print(f"[green]{len(records)} kernels, none worse than the baseline.[/]")
