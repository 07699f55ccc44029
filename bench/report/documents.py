"""Fills the generated tables of documents, between the markers <!-- bench:NAME --> and <!-- /bench:NAME -->."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from bench.core.records import Results
from bench.core.schema import ResultsError
from bench.report import tables

MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench:(?P=name) -->)", re.DOTALL)
ANY_MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")


def fill(text: str, results: Results | None) -> str:
    """Return `text` with every marked block generated anew; "not measured" without results.

    Results of a pretended GPU fill only the tables for pretended GPUs, and of those the ones for which they have a record;
    results of a GPU fill all other tables.

    Raises:
        ResultsError: the results were not measured, a marker has no partner, or a name is not that of a table.
    """
    if results is not None and (results.invented or results.dry_run):
        raise ResultsError("only measured results go into a document: these are a dry run or a sample")

    def anew(name: str) -> str | None:
        if results is not None and results.environment.pretended != (name in tables.PRETENDED):
            return None
        if results is not None and name in tables.PRETENDED and not tables.TABLES[name](results).rows:
            return None
        return tables.named(name, results)

    return fill_by(text, tables.TABLES, anew)


def fill_by(text: str, names: Collection[str], anew: Callable[[str], str | None]) -> str:
    """Return `text` with each marked block replaced by `anew(its name)`; None keeps the block.

    Raises:
        ResultsError: a marker has no partner, or a block's name is not among `names`.
    """
    blocks = list(MARKED.finditer(text))
    if len(ANY_MARKER.findall(text)) != 2 * len(blocks):
        raise ResultsError("a bench marker without its partner, or one inside another")
    unknown = [block["name"] for block in blocks if block["name"] not in names]
    if unknown:
        raise ResultsError(f"no table is called {unknown[0]!r}; there are {', '.join(names)}")

    def replaced(block: re.Match[str]) -> str:
        found = anew(block["name"])
        return block[0] if found is None else f"{block[1]}{found}\n{block[3]}"

    return MARKED.sub(replaced, text)


def write(path: Path, results: Results | None) -> bool:
    """Fill the blocks of a file; returns whether the file changed."""
    before = path.read_text()
    try:
        after = fill(before, results)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}") from None
    if after != before:
        path.write_text(after)
    return after != before
