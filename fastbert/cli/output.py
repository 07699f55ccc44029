"""What the commands share: the consoles, progress on a terminal, results as JSON, and how an error becomes an exit code.

Exit codes: 0 all is right, 1 something differs or a check failed, 2 the input is wrong, 130 stopped by Ctrl-C.
"""

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastbert.errors import InputError, one_line

EXIT_CODES = "Exit codes: 0 all is right; 1 something differs or a check failed; 2 the input is wrong; 130 stopped by Ctrl-C."
WRONG_INPUT = 2
STDOUT = Path("-")
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the results to this file; -: to stdout, and nothing else there."),
]
# The class of typer's errors of usage; typer has it under another name in each release.
_UsageError = typer.BadParameter.__bases__[0]

err = Console(stderr=True)
_stdout: list[TextIO] = []  # what sys.stdout was before it was left to the JSON
Begin = Callable[..., None]


def console_for(json_file: Path | None) -> Console:
    """The console of stdout, which is silent if stdout belongs to the JSON."""
    return Console(quiet=json_file == STDOUT)


def leave_stdout_to(json_file: Path | None) -> None:
    """If the JSON goes to stdout, send to stderr what anything else prints until then, such as a library at its import."""
    if json_file == STDOUT and sys.stdout is not sys.stderr:
        _stdout[:] = [sys.stdout]
        sys.stdout = sys.stderr


def check_json(json_file: Path | None) -> None:
    """Check, before anything runs, that the JSON can be written, and leave stdout to it.

    Raises:
        InputError: its folder does not exist, or it is a folder itself.
    """
    leave_stdout_to(json_file)
    if json_file is None or json_file == STDOUT:
        return
    if json_file.is_dir():
        raise InputError(f"--json: {json_file} is a folder")
    if not json_file.parent.is_dir():
        raise InputError(f"--json: there is no folder {json_file.parent}")


def write_json(data: Any, json_file: Path | None) -> None:
    """Write `data` as strict JSON, in which numbers that are not finite are null.

    Raises:
        InputError: the file cannot be written.
    """
    if json_file is None:
        return
    text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
    if json_file == STDOUT:
        if _stdout:
            sys.stdout = _stdout.pop()
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        json_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json: cannot write {json_file}: {error.strerror}") from None


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def progress(what: str, json_file: Path | None = None) -> Iterator[Begin]:
    """Show on stderr that something runs, if that is a terminal and stdout is not the JSON's.

    Yields a function to call with the name of the step that begins and, where they are known, with how many steps are done
    and how many there are.
    """
    if not err.is_terminal or json_file == STDOUT:
        yield lambda name, done=None, total=None: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # What is printed meanwhile goes above the bar; but output that goes to a file or a pipe stays there.
    with Progress(*columns, console=err, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task(what, total=None)

        def begin(name: str, done: int | None = None, total: int | None = None) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield begin


def file_error(error: OSError) -> str:
    """One line about a path that cannot be used, such as one that is too long or may not be read."""
    return one_line(f"{error.filename}: {error.strerror}")


def run(app: typer.Typer) -> None:
    """Run a command line and exit. An error of the user's is one line on stderr, and so is a path that cannot be used."""
    try:
        code = app(standalone_mode=False)
    except (InputError, _UsageError) as error:
        said = error.format_message() if isinstance(error, _UsageError) else str(error)
        code = _refuse(said)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            code = _refuse(f"cannot write {error.filename or 'the output'}: {error.strerror}")
            _drop_output()
        elif error.filename is None:  # not about a path, so not the user's
            raise
        else:
            code = _refuse(file_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(said: str) -> int:
    err.print(f"error: {one_line(' '.join(said.split()))}", highlight=False, markup=False, soft_wrap=True)
    return WRONG_INPUT


def _drop_output() -> None:
    """Forget what could not be written to stdout: Python would try again at its end, and print another error."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the process ends
