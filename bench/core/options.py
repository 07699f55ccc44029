"""Options that several commands of `python -m bench` share, their consoles, and how an error becomes an exit code.

fastbert.cli.output has the form of JSON and progress. It is imported inside functions, as everything of fastbert: a dry run
selects the interpreter first.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

# Piped output has no terminal width. This width keeps tables from wrapping.
console = Console(width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True)

WORKERS = 256  # most processes of a command
READERS = 4096  # most readers of a stream, each of which has a block of text in memory


def finite(value: float) -> float:
    """Check a number of the command line.

    Raises:
        BadParameter: it is nan or infinite, which no comparison with a limit finds.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


DryRun = Annotated[bool, typer.Option("--dry-run", help="Run the same code on tiny shapes without a GPU; nothing is timed.")]
Budget = Annotated[float, typer.Option(callback=finite, help="Time limit for the whole run, in seconds.")]
Dtypes = Annotated[list[str], typer.Option(help="bf16, fp16 or fp32.")]
Out = Annotated[Path, typer.Option(help="Folder for the results and the report.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results to this file; -: to stdout, and nothing else there."),
]
OUT = Path("bench-out")
HOUR = 3600.0
STDOUT = Path("-")
EXIT_CODES = (
    "Exit codes: 0 all is right; 1 something differs, is worse or failed; 2 the input is wrong; 3 there is no GPU, so nothing "
    "was measured; 130 stopped by Ctrl-C."
)
# The class of typer's errors of usage; typer has it under another name in each release.
_UsageError = typer.BadParameter.__bases__[0]


def print_plainly(line: object) -> None:
    """Print one line without wrapping, markup or colours, whatever names of files are in it."""
    from fastbert.errors import one_line

    console.print(one_line(str(line)), highlight=False, soft_wrap=True, markup=False)


def print_lines(text: str) -> None:
    """Print a text of several lines, each as `print_plainly` does."""
    for line in text.split("\n"):
        print_plainly(line)


def fail(error: object) -> typer.Exit:
    """Print a one-line error on stderr; returns the exit for the command to raise."""
    from fastbert.errors import one_line

    said = one_line(str(error).removeprefix("error: "))
    errors.print(f"error: {said}", highlight=False, soft_wrap=True, markup=False, style="red")
    return typer.Exit(2)


def leave_stdout_to(json: Path | None) -> None:
    """Print nothing if the JSON goes to stdout. Every command with --json calls this before it prints.

    Otherwise it imports nothing of fastbert: the command has still to choose between a GPU and the interpreter.
    """
    console.quiet = json == STDOUT
    if console.quiet:
        from fastbert.cli import output

        output.leave_stdout_to(json)


def check_json(json: Path | None) -> None:
    """Make the folder of the JSON; exit with 2 if the JSON could not be written at the end."""
    from fastbert.cli import output
    from fastbert.errors import InputError

    try:
        if json:
            json.parent.mkdir(parents=True, exist_ok=True)
        output.check_json(json)
    except (InputError, OSError) as error:
        raise fail(error) from None


def write_json(data: Any, json: Path | None) -> None:
    """Write a dataclass or plain data as JSON; exit with 2 if that cannot be done."""
    from fastbert.cli import output
    from fastbert.errors import InputError

    try:
        output.write_json(dataclasses.asdict(data) if dataclasses.is_dataclass(data) else data, json)
    except InputError as error:
        raise fail(error) from None


def run(app: typer.Typer) -> None:
    """Run the command line and exit. A wrong option, a path that cannot be used, or a package that is not installed is one line
    on stderr."""
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        code = fail(" ".join(error.format_message().split())).exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "bench", "fastbert"):
            raise
        code = fail(f'{package} is not installed: pip install -c constraints.txt -e ".[bench]"').exit_code
    except OSError as error:
        if error.filename is None:  # not about a path, so not the user's
            raise
        from fastbert.cli.output import file_error

        code = fail(file_error(error)).exit_code
    sys.exit(code if isinstance(code, int) else 0)
