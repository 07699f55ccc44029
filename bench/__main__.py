"""python -m bench: measurements of the kernels from the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from bench import audit as audits
from bench.tables import audit_table, floor_table

app = typer.Typer(add_completion=False, no_args_is_help=True)
# Piped output has no width of its own: wide enough that no table wraps.
console = Console(width=None if sys.stdout.isatty() else 200)


@app.callback()
def main() -> None:
    """Measurements of the kernels."""


@app.command()
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
    if short and update:
        raise typer.BadParameter("--update takes a whole run: leave --short out")
    ops, architectures = _select(op, arch)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("compiling")

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        records = audits.run(ops, architectures, workers, advance, short)
    console.print(audit_table(records, top or len(records)))
    console.print(floor_table(ops))
    if json:
        audits.write(records, json)
    if check:
        _check(records, ops, architectures, short)
    if update:
        baseline = audits.read() if audits.BASELINE.exists() else []
        audits.write(audits.merge(baseline, records, ops, architectures))
        console.print(f"{len(records)} records accepted into {audits.BASELINE}")


def _select(ops: list[str], architectures: list[str]) -> tuple[list[str], list[str]]:
    try:
        return audits.selection(ops, architectures)
    except KeyError as error:
        known = ", ".join([*audits.CASES, *audits.ARCHITECTURES])
        raise typer.BadParameter(f"{error.args[0]} is unknown; known are {known}") from None


def _check(records: list[audits.Record], ops: list[str], architectures: list[str], short: bool) -> None:
    problems = audits.compare(audits.selected(audits.read(), ops, architectures, short), records)
    for problem in problems:
        console.print(f"[red]worse:[/] {problem}", highlight=False)
    if problems:
        console.print("If this is meant: python -m bench audit --update, and say why in bench/NOTES.md.")
        raise typer.Exit(1)
    console.print(f"[green]{len(records)} kernels, none worse than the baseline.[/]")


if __name__ == "__main__":
    app()
