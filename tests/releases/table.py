"""Makes docs/supported.md's tables of tested releases, from the JSON of a run, and of families, from the registry."""

import re
from pathlib import Path
from typing import Any

from packaging.version import Version

from bench.report.table import Table
from tests.releases.matrix import ROOT, Record

PAGE = ROOT / "docs" / "supported.md"
_FAMILIES = ["family", "model", "heads (...For...)", "leave out padding by default", "compute the loss from labelled rows"]


def render(results: dict[str, Any]) -> str:
    """One row per release of transformers, one column per release of triton, and what they ran on."""
    pairs = {(record["transformers"], record["triton"]): record for record in results["pairs"]}
    rows, columns = (sorted({pair[i] for pair in pairs}, key=Version) for i in (0, 1))
    cells = [[one, *(_cell(pairs.get((one, other))) for other in columns)] for one in rows]
    grid = Table(["transformers", *(f"triton {other}" for other in columns)], cells).markdown()
    ran_on = sorted({f"torch {r['torch']}, Python {r['python']}" for r in pairs.values() if "torch" in r})
    return f"{grid}\n\nModel tests in Triton's interpreter; {'; '.join(ran_on)}."


def _cell(record: Record | None) -> str:
    if record is None:
        return "not run"
    if "error" in record:
        return f"does not start: {record['error']}"
    ran = record["passed"] + record["failed"]
    return f"{ran} passed" if not record["failed"] else f"{record['failed']} of {ran} failed"


def render_families() -> str:
    """One row per supported family."""
    from fastbert.registry import families_table  # imports transformers

    return Table(_FAMILIES, families_table()).markdown()


def fill(text: str, results: dict[str, Any]) -> str:
    """`text` with the table of releases between its markers.

    Raises:
        ValueError: `text` has no such markers, or more than one pair.
    """
    return _filled(text, "releases", render(results))


def fill_families(text: str) -> str:
    """`text` with the table of families between its markers.

    Raises:
        ValueError: as `fill`.
    """
    return _filled(text, "families", render_families())


def _filled(text: str, name: str, table: str) -> str:
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, found = marked.subn(lambda marks: f"{marks[1]}{table}\n{marks[2]}", text)
    if found != 1:
        raise ValueError(f"expected <!-- {name} --> and <!-- /{name} --> once, found them {found} times")
    return filled


def update(document: Path, results: dict[str, Any]) -> None:
    document.write_text(fill_families(fill(document.read_text(), results)))
