"""The command `python -m bench scaling`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import Json, check_json, console, leave_stdout_to, print_lines, write_json

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
MOST = 1 << 16  # GPUs, and rows of one
MODELS = {"base": "BERT-base", "large": "BERT-large"}


def scaling(
    model: Annotated[str, typer.Option(help="base or large.")] = "large",
    gpus: Annotated[list[int], typer.Option(help="Number of GPUs; may be repeated.")] = [8, 64, 1024],
    rows: Annotated[int, typer.Option(help="Sequences of one GPU's batch.")] = 32,
    busy: Annotated[float, typer.Option(help="Share of a product's rate that forward and backward reach.")] = 0.5,
    update: Annotated[bool, typer.Option("--update", help="Write the tables into docs/scaling.md.")] = False,
    json: Json = None,
) -> None:
    """Count what each rank sends per step, and simulate steps on many GPUs. Needs no GPU; measures nothing."""
    leave_stdout_to(json)
    check_json(json)
    from bench.report import documents
    from bench.scaling.assumptions import Assumptions
    from bench.scaling.tables import TABLES, Question, built
    from fastbert.cli.output import progress

    if model not in MODELS:
        raise typer.BadParameter(f"--model: expected {' or '.join(MODELS)}, got {model!r}")
    node = Assumptions().node
    if wrong := [n for n in gpus if not 0 < n <= MOST or (n > node and n % node)]:
        raise typer.BadParameter(f"--gpus: expected 1 to {node}, or a multiple of {node} up to {MOST}, got {wrong[0]}")
    if not 0 < rows <= MOST or not 0 < busy <= 1:
        raise typer.BadParameter(f"expected --rows from 1 to {MOST} and --busy in (0, 1], got {rows} and {busy:g}")
    question = Question(MODELS[model], tuple(gpus), rows, Assumptions(busy=busy))
    if update and question != Question():
        raise typer.BadParameter("--update: the page has the tables of the default options")
    with progress("simulating", json):
        found = built(question)
    tables = {name: table.markdown() for name, table in found.items()}
    for name, table in tables.items():
        print_lines(f"{name}\n\n{table}\n")
    if update:
        before = PAGE.read_text()
        after = documents.fill_by(before, TABLES, tables.get)
        PAGE.write_text(after)
        console.print(f"{PAGE.name}: {'written' if after != before else 'unchanged'}")
    write_json({"question": asdict(question), "tables": {name: asdict(table) for name, table in found.items()}}, json)
