"""Output of a command without a GPU and without --dry-run: the floors, and no times."""

from rich.console import Console

from bench.audit.run import ops
from bench.audit.tables import floor_table

EXIT = 3  # no GPU: nothing was measured


def explain(console: Console) -> int:
    """Print the floor table; returns the exit status."""
    console.print(floor_table(list(ops())))
    console.print(
        "No GPU here, so nothing was timed: these are the shortest times possible, from stated bytes and operations.\n"
        "--dry-run runs the same code on tiny shapes; python -m bench audit compiles every kernel."
    )
    return EXIT
