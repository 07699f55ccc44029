"""Options that several commands of `python -m bench` share, and their console."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Piped output has no terminal width. This width keeps tables from wrapping.
console = Console(width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Run the same code on tiny shapes without a GPU; nothing is timed.")]
Budget = Annotated[float, typer.Option(help="Time limit for the whole run, in seconds.")]
Dtypes = Annotated[list[str], typer.Option(help="bf16, fp16 or fp32.")]
Out = Annotated[Path, typer.Option(help="Folder for the results and the report.")]
OUT = Path("bench-out")
HOUR = 3600.0


def print_plainly(line: object) -> None:
    """Print one line without wrapping, markup or colours, whatever names of files are in it."""
    from fastbert.errors import one_line

    console.print(one_line(str(line)), highlight=False, soft_wrap=True, markup=False)


def fail(error: object) -> typer.Exit:
    """Print a one-line error on stderr; returns the exit for the command to raise."""
    from fastbert.errors import one_line

    said = one_line(str(error).removeprefix("error: "))
    errors.print(f"error: {said}", highlight=False, soft_wrap=True, markup=False, style="red")
    return typer.Exit(2)
