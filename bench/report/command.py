"""The command `python -m bench report`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import fail, print_plainly


def report(
    results: Annotated[list[Path], typer.Argument(help="results.json of one machine, one or several.")] = [],
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, report.md and the pictures.")] = None,
    write: Annotated[list[Path], typer.Option(help="Fill the marked tables of this file; may be repeated.")] = [],
) -> None:
    """Write results as tables, pictures and a page. Without results the marked tables say "not measured"."""
    from bench.core import schema
    from bench.report import documents, files

    try:
        found = schema.read_all(results) if results else None
        changed = {path: documents.write(path, found) for path in write}
    except (schema.ResultsError, OSError) as error:
        raise fail(error) from None
    for path, different in changed.items():
        print_plainly(f"{path}: {'written' if different else 'unchanged'}")
    if found:
        for path in files.write(found, out or results[0].parent):
            print_plainly(path)
