"""What several commands of `python -m bench` take, and where they print."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Piped output has no width of its own: wide enough that no table wraps.
console = Console(width=None if sys.stdout.isatty() else 200)

DryRun = Annotated[bool, typer.Option("--dry-run", help="The same path on tiny shapes, without a GPU and without a time.")]
Budget = Annotated[float, typer.Option(help="Seconds that all of it may take.")]
Dtypes = Annotated[list[str], typer.Option(help="bf16, fp16 or fp32.")]
Out = Annotated[Path, typer.Option(help="Folder for the results and the report.")]
OUT = Path("bench-out")
HOUR = 3600.0


def print_plainly(line: object) -> None:
    """One line as it is: not wrapped, no markup, no colours."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def fail(error: object) -> typer.Exit:
    """Print a file's one-line error; the exit for a command to raise."""
    console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
    return typer.Exit(2)
