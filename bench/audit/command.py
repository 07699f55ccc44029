"""python -m bench audit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from bench.core.options import console

if TYPE_CHECKING:
    from bench.audit.run import Record


def audit(
    op: Annotated[list[str], typer.Option(help="Only this op; may be given again.")] = [],
    arch: Annotated[list[str], typer.Option(help="Only this architecture; may be given again.")] = [],
    json: Annotated[Path | None, typer.Option(help="Write the records here.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Only BERT-base in bf16, as .ci/run does.")] = False,
    check: Annotated[bool, typer.Option(help="Exit 1 if anything is worse than the baseline.")] = False,
    update: Annotated[bool, typer.Option(help="Accept what was found as the new baseline.")] = False,
    top: Annotated[int, typer.Option(help="Rows of the table; 0 for all.")] = 40,
    workers: Annotated[int, typer.Option(help="Compilers at a time.")] = 2,
) -> None:
    """Compile every op x configuration x architecture and read what came out. No GPU needed, nothing is timed."""
    from bench.audit.run import WHOLE, baseline, merge, read, release, run, write
    from bench.audit.tables import audit_table, floor_table

    triton = release()
    if update and short is (triton == WHOLE):
        raise typer.BadParameter(f"--update takes a whole run under triton {WHOLE}, and one with --short under others")
    if check and not baseline(triton).exists():
        raise typer.BadParameter(f"no state was accepted under triton {triton}: --short --update does that")
    ops, architectures = _select(op, arch)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        records = run(ops, architectures, workers, advance, short)
    console.print(audit_table(records, top or len(records)))
    console.print(floor_table(ops))
    if json:
        write(records, json)
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
        console.print("If this is meant: python -m bench audit --update, and say why in bench/LOG.md.")
        raise typer.Exit(1)
    console.print(f"[green]{len(records)} kernels, none worse than the baseline.[/]")
