"""python -m bench: measurements of the kernels from the command line.

What imports triton is imported inside the commands: a dry run first chooses its interpreter.
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from bench.audit import run as audits
from bench.audit.tables import audit_table, floor_table
from bench.train import cli as train

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
    release = audits.release()
    if update and short is (release == audits.WHOLE):
        raise typer.BadParameter(f"--update takes a whole run under triton {audits.WHOLE}, and one with --short under others")
    if check and not audits.baseline(release).exists():
        raise typer.BadParameter(f"no state was accepted under triton {release}: --short --update does that")
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
        path = audits.baseline(release)
        audits.write(audits.merge(audits.read(release) if path.exists() else [], records, ops, architectures), path)
        console.print(f"{len(records)} records accepted into {path}")


@app.command()
def layer() -> None:
    """What a BERT-base layer in training launches and how many bytes that moves. No GPU needed, nothing runs."""
    from bench.host.layer_traffic import table

    console.print(table())


def _select(ops: list[str], architectures: list[str]) -> tuple[list[str], list[str]]:
    try:
        return audits.selection(ops, architectures)
    except KeyError as error:
        known = ", ".join([*audits.CASES, *audits.ARCHITECTURES])
        raise typer.BadParameter(f"{error.args[0]} is unknown; known are {known}") from None


def _check(records: list[audits.Record], ops: list[str], architectures: list[str], short: bool) -> None:
    accepted = audits.read(audits.release())
    problems = audits.compare(audits.selected(accepted, ops, architectures, short), records)
    for problem in problems:
        console.print(f"[red]worse:[/] {problem}", highlight=False)
    if problems:
        console.print("If this is meant: python -m bench audit --update, and say why in bench/NOTES.md.")
        raise typer.Exit(1)
    console.print(f"[green]{len(records)} kernels, none worse than the baseline.[/]")


DryRun = Annotated[bool, typer.Option("--dry-run", help="The same path on tiny shapes, without a GPU and without a time.")]
Documents = Annotated[list[Path], typer.Option(help="Fill the marked tables of this file; may be given again.")]


def _start(dry_run: bool) -> None:
    """Choose the interpreter for a dry run; without one and without a GPU print the floors and exit with 3."""
    import torch

    from bench.audit.no_gpu import explain

    if dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # what is started from here on sees no GPU
        console.print("[yellow]dry run: tiny shapes, no time is taken[/]")
    elif not torch.cuda.is_available():
        raise typer.Exit(explain(console))


def _run(plan: Iterable[Any], dry_run: bool, budget: float, out: Path, commit: str | None = None, tests: Any = None) -> None:
    """Run a plan, write results and report into `out`, and exit with 1 if a check failed or nothing was reached.

    A signal that asks for the end stops the job that runs; what was reached is written then too, without the pictures.
    `tests`: a record of tests that have run before.
    """
    from bench.core import environment, schema, stop
    from bench.core.records import Results
    from bench.report import files as report
    from bench.runner import gpu, isolate

    start = time.monotonic()
    with stop.listening():
        isolate.SERVER.begin()  # it imports while the machine is asked what it is
        results = Results(environment.read(commit), dry_run=dry_run, tests=tests)
        left = budget - (time.monotonic() - start)
        gpu.run(plan, results, left, out, console.print, after=lambda: report.write_markdown(results, out))
        write = report.write_markdown if stop.reason() else report.write_page
        gpu.record("report", lambda: write(results, out), results)
        schema.write(results, out / gpu.RESULTS)
        for path in sorted(out.iterdir()):
            console.print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")
        status = _conclude(results)
        if stop.reason():
            console.print(f"[red]{stop.reason()}[/]")
        if status or stop.status():
            raise typer.Exit(stop.status() or status)


def _conclude(results: Any) -> int:
    """Say what failed; returns the exit status."""
    from bench.runner import accept as accepting

    for line in accepting.failures(results):
        console.print(line, highlight=False, soft_wrap=True, markup=False, style="red")
    if any(record.op == "feed_forward" and record.seconds for record in results.ops):
        from bench.ops import feed_forward_lanes
        from bench.tune import candidates

        console.print(feed_forward_lanes.earned_table(results.ops, candidates.architecture_here()))
    reached = [stage for stage in results.stages if stage.status == "ok"]
    console.print(f"{len(reached)} of {len(results.stages)} jobs done")
    found = (*results.models, *results.ops, *results.host)
    tests = results.tests
    wrong = any(record.status == "failed" for record in found) or (tests and tests.failed + tests.errors)
    return 1 if wrong or not (found or tests or results.tuning or results.ceilings) else 0


@app.command()
def gpu(
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 480.0,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.md and report.html.")] = Path("bench-out"),
    test_log: Annotated[
        Path | None,
        typer.Option(help="Of tests that ran before, with `-p bench.runner.pytest_log --test-log FILE`; no others are run."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="What is measured, where the files are no git checkout.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Everything in one call and within the time given, most important first; whatever is reached is written."""
    start = time.monotonic()
    if test_log and not test_log.is_file():
        raise typer.BadParameter(f"--test-log {test_log}: no such file")
    _start(dry_run)
    from bench.runner import plan, suite

    tests = suite.read(test_log) if test_log else None
    jobs = plan.dry_plan() if dry_run else plan.gpu_plan(budget, tests=tests is None)
    _run(jobs, dry_run, budget - (time.monotonic() - start), out, commit, tests)


@app.command()
def models(
    model: Annotated[list[str], typer.Option(help="BERT-base or BERT-large.")] = ["BERT-base"],
    head: Annotated[list[str], typer.Option(help="A task of `fastbert verify`: mlm, classification, ...")] = ["mlm"],
    mode: Annotated[list[str], typer.Option(help="train or infer.")] = ["train"],
    batch: Annotated[list[int], typer.Option(help="Sequences.")] = [32],
    seqlen: Annotated[list[int], typer.Option(help="Their padded length.")] = [512],
    fill: Annotated[list[float], typer.Option(help="Share of real tokens.")] = [0.5, 1.0],
    lane: Annotated[list[str], typer.Option(help="Only this lane; all of them by default.")] = [],
    lengths: Annotated[Path | None, typer.Option(help="A length a line, instead of the distribution.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text, a sequence a line: its tokenised lengths.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Whose tokenizer reads --data.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 3600.0,
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path("bench-out"),
    dry_run: DryRun = False,
) -> None:
    """Training steps and inference of whole models, lane by lane."""
    from bench.runner.selection import SelectionError, model_jobs

    try:
        jobs = model_jobs(
            model, head, mode, batch, seqlen, fill, lane, lengths=lengths, data=data, tokenizer=tokenizer, dry_run=dry_run
        )
    except SelectionError as error:
        raise typer.BadParameter(str(error)) from None
    _start(dry_run)
    _run(jobs, dry_run, budget, out)


@app.command()
def ops(
    op: Annotated[list[str], typer.Option(help="Only this op; may be given again.")] = [],
    dtype: Annotated[list[str], typer.Option(help="bf16, fp16 or fp32.")] = ["bf16"],
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 3600.0,
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path("bench-out"),
    dry_run: DryRun = False,
) -> None:
    """Every op beside its peers: the same grid as `pytest bench`, without what the host adds to a call."""
    from bench.runner.selection import SelectionError, op_jobs

    try:
        jobs = op_jobs(op, dtype, dry_run)
    except SelectionError as error:
        raise typer.BadParameter(str(error)) from None
    _start(dry_run)
    _run(jobs, dry_run, budget, out)


@app.command()
def host(
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    seconds: Annotated[float, typer.Option(help="Of timed steps a case.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns of each lane.")] = 15,
    compiled: Annotated[bool, typer.Option("--compile", help="With a lane of torch.compile, which takes minutes.")] = False,
    names: Annotated[bool, typer.Option("--names", help="List the launches of each lane by name.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results here, for `report`.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 if a lane misses its target.")] = False,
    dry_run: DryRun = False,
) -> None:
    """The host's time of whole steps as ratios to stock, their launches and peak memory; also on a pretended GPU."""
    if dry_run and check:
        raise typer.BadParameter("--check takes a measurement: leave --dry-run out")
    if seconds <= 0 or rounds < 1:
        raise typer.BadParameter(f"expected --seconds above 0 and --rounds from 1 on, got {seconds:g} and {rounds}")
    _start(dry_run)
    from bench.host import command as host_command

    raise typer.Exit(host_command.run(console, only, seconds, rounds, compiled, names, json, check, dry_run))


@app.command()
def tune(
    kernel: Annotated[list[str], typer.Option(help="A table of kernels/core/configs.py; may be given again.")] = [],
    dtype: Annotated[list[str], typer.Option(help="bf16, fp16 or fp32.")] = ["bf16"],
    arch: Annotated[str | None, typer.Option(help="Without a GPU: whose candidates to audit.")] = None,
    most: Annotated[int, typer.Option(help="Candidates an entry, the closest to the present one first.")] = 24,
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 3600.0,
    out: Annotated[Path, typer.Option(help="Where the measured table goes, as JSON.")] = Path("bench-out/tune.json"),
    dry_run: DryRun = False,
) -> None:
    """Times the candidate configurations that the audit passes, and prints the best of each entry with its lead."""
    from bench.runner.selection import SelectionError, tune_jobs

    try:
        jobs = tune_jobs(kernel, dtype, arch, most)
    except SelectionError as error:
        raise typer.BadParameter(str(error)) from None
    _start(dry_run)
    from bench.core import environment, schema
    from bench.core.records import Results
    from bench.report import tune_tables
    from bench.runner import gpu as runner

    results = Results(environment.read(), dry_run=dry_run)
    runner.run(jobs, results, budget, out.parent, console.print, reserve=0.0, name=out.name)
    schema.write(results, out)
    console.print(tune_tables.candidates_table(results.tuning) if dry_run else tune_tables.best_table(results.tuning))
    console.print(f"{out}")


@app.command()
def accept(
    results: Annotated[list[Path], typer.Argument(help="results.json of one machine, or the folder with it; one or several.")],
    root: Annotated[Path, typer.Option(help="The checkout whose documents are written.")] = Path(),
) -> None:
    """What a GPU gave, into the repository: results, pictures, the tables of README and NOTES; prints what to change."""
    from bench.core import schema
    from bench.runner import accept as accepting

    try:
        written, lines = accepting.accept([path / "results.json" if path.is_dir() else path for path in results], root)
    except (schema.ResultsError, OSError) as error:
        console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(f"git add {' '.join(map(str, written))}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="results.json of one machine, one or several.")] = [],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and the pictures.")] = None,
    write: Documents = [],
) -> None:
    """Results as tables, pictures and a page. Without results the marked tables say "not measured"."""
    from bench.core import schema
    from bench.report import documents
    from bench.report import files as reports

    try:
        found = schema.read_all(results) if results else None
        changed = {path: documents.write(path, found) for path in write}
    except (schema.ResultsError, OSError) as error:
        console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    for path, different in changed.items():
        console.print(f"{path}: {'written' if different else 'as it was'}")
    if found:
        for path in reports.write(found, out or results[0].parent):
            console.print(f"{path}")


app.command()(train.train)


if __name__ == "__main__":
    app()
