"""The commands `python -m bench gpu` and `python -m bench accept`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import OUT, Budget, DryRun, Json, check_json, fail, leave_stdout_to, print_plainly, write_json
from bench.runner import session


def gpu(
    budget: Budget = 480.0,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.md and report.html.")] = OUT,
    test_log: Annotated[
        Path | None,
        typer.Option(help="Log of a finished test run (`-p bench.runner.pytest_log --test-log FILE`), in place of a new one."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="The measured commit, if the files are not a git checkout.")] = None,
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Run every measurement within the given time, most important first. All results reached by then are written."""
    start = time.monotonic()
    if test_log and not test_log.is_file():
        raise typer.BadParameter(f"--test-log {test_log}: no such file")
    session.start(dry_run, json)
    from bench.runner import plan, suite

    try:
        tests = suite.read(test_log) if test_log else None
    except (ValueError, KeyError, TypeError, RecursionError):  # not UTF-8, not JSON, or JSON of something else
        raise typer.BadParameter(f"--test-log {test_log}: not a log of bench.runner.pytest_log") from None
    jobs = plan.dry_plan() if dry_run else plan.gpu_plan(budget, tests=tests is None)
    session.run(jobs, dry_run, budget - (time.monotonic() - start), out, commit, tests, json)


def accept(
    results: Annotated[list[Path], typer.Argument(help="results.json of one machine, or its folder; one or several.")],
    root: Annotated[Path, typer.Option(help="The checkout to write into.")] = Path(),
    json: Json = None,
) -> None:
    """Write GPU results into the repository: results, pictures, the tables of the documents. Prints what to change."""
    leave_stdout_to(json)
    check_json(json)
    from bench.core.schema import ResultsError
    from bench.runner import acceptance

    try:
        written, lines = acceptance.accept([path / "results.json" if path.is_dir() else path for path in results], root)
    except (ResultsError, OSError) as error:
        raise fail(error) from None
    for line in lines:
        print_plainly(line)
    print_plainly(f"git add {' '.join(map(str, written))}")
    write_json({"written": [str(path) for path in written], "to_change": lines}, json)
