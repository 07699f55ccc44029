"""The command `python -m bench report`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import Json, check_json, fail, leave_stdout_to, print_plainly, write_json


def report(
    results: Annotated[list[Path], typer.Argument(help="results.json of one machine, one or several.")] = [],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and the pictures.")] = None,
    write: Annotated[list[Path], typer.Option(help="Fill the marked tables of this file; may be repeated.")] = [],
    json: Json = None,
) -> None:
    """Write results as tables, pictures and a page. Without results the marked tables say "not measured"."""
    leave_stdout_to(json)
    check_json(json)
    from bench.core import schema
    from bench.report import documents, files
    from fastbert.cli.output import progress

    try:
        found = schema.read_all(results) if results else None
        changed = {path: documents.write(path, found) for path in write}
    except (schema.ResultsError, OSError) as error:
        raise fail(error) from None
    for path, different in changed.items():
        print_plainly(f"{path}: {'written' if different else 'unchanged'}")
    made: list[Path] = []
    if found:
        with progress("drawing", json):
            made = list(files.write(found, out or results[0].parent))
        for path in made:
            print_plainly(path)
    changed_documents = [path for path, different in changed.items() if different]
    write_json({"written": [str(path) for path in (*changed_documents, *made)]}, json)
