"""python -m tests.releases: updates the table of digests, runs tests over releases, writes the tables of docs/supported.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from tests.releases import matrix, overlay, table

app = typer.Typer(add_completion=False, no_args_is_help=True)
Cache = Annotated[Path, typer.Option(help="Where releases are unpacked.")]


def several(names: tuple[str, ...]) -> Callable[[], list[str]]:
    return lambda: list(names)


@app.callback()
def main() -> None:
    """Test fastbert under other releases of transformers and triton."""


@app.command()
def digests(
    transformers: Annotated[
        list[str] | None, typer.Option(help="This release instead of the installed one; may be repeated.")
    ] = None,
    cache: Cache = overlay.CACHE,
) -> None:
    """Add the forwards of transformers to fastbert/data/forwards.json, after which they count as tested."""
    if transformers:
        for release in transformers:
            print(matrix.python(["-m", "tests.releases", "digests"], overlay.of_transformers(release, cache)), end="")
        return
    from tests.releases import digests  # imports transformers

    for line in (*digests.update(), *digests.update_sentence_transformers()):
        print(line)


@app.command()
def run(
    transformers: Annotated[
        list[str], typer.Option(help="A release; may be repeated.", default_factory=several(matrix.TRANSFORMERS))
    ],
    triton: Annotated[list[str], typer.Option(help="A release; may be repeated.", default_factory=several(matrix.TRITON))],
    test: Annotated[list[str], typer.Option(help="A file of tests; may be repeated.", default_factory=several(matrix.TESTS))],
    out: Annotated[Path, typer.Option(help="What came out; pairs that are not run stay in it.")] = matrix.RESULTS,
    cache: Cache = overlay.CACHE,
    jobs: Annotated[int, typer.Option(min=1, help="Test processes at a time.")] = 2,
) -> None:
    """Run the model tests on every pair of releases. Exit code 1 unless all of them pass."""
    if not matrix.run(transformers, triton, out, cache, test, jobs, lambda line: print(line, flush=True)):
        raise typer.Exit(1)


@app.command()
def audit(
    triton: Annotated[list[str], typer.Option(help="A release; may be repeated.", default_factory=several(matrix.TRITON))],
    update: Annotated[bool, typer.Option("--update", help="Accept what was found.")] = False,
    cache: Cache = overlay.CACHE,
) -> None:
    """Run the short compile audit under other releases of triton. Exit code 1 if anything is worse than accepted."""
    if not all([matrix.audit(release, update, cache) for release in triton]):
        raise typer.Exit(1)


@app.command("table")
def table_(
    results: Annotated[Path, typer.Option(help="What a run wrote.")] = matrix.RESULTS,
    into: Annotated[Path, typer.Option(help="The document with the markers.")] = table.PAGE,
) -> None:
    """Write the tables of tested releases and of supported families between the markers of docs/supported.md."""
    table.update(into, matrix.read(results))


app()
