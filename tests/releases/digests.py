"""Adds the digests of the installed transformers release to the table."""

import json
from pathlib import Path

import transformers
from packaging.version import Version

from fastbert import forwards
from fastbert.layers.stock import covered

TABLE = Path(forwards.__file__).parent / "data/forwards.json"
Table = dict[str, dict[str, str]]


def of_this_release() -> dict[str, str]:
    """The digests of the covered functions that this release has, by qualified name."""
    return {forwards.label(*pair): forwards.digest(getattr(*pair)) for pair in covered()}


def added(table: Table, found: dict[str, str], release: str) -> Table:
    """`table` with the digests of a release added; each digest keeps its oldest release."""
    result = {name: dict(digests) for name, digests in table.items()}
    for name, digest in found.items():
        releases = result.setdefault(name, {})
        releases[digest] = min(releases.get(digest, release), release, key=Version)
    return result


def write(table: Table, path: Path = TABLE) -> None:
    """Write the table sorted by name and release, with one digest per line."""
    ordered = {name: dict(sorted(table[name].items(), key=lambda item: (Version(item[1]), item[0]))) for name in sorted(table)}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def update(path: Path = TABLE) -> list[str]:
    """Add this release's digests to the table at `path`; returns one line per new digest."""
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    found = of_this_release()
    if unreadable := [name for name, digest in found.items() if digest is None]:
        raise SystemExit(f"not transformers' own, or without source: {', '.join(unreadable)}")
    write(added(table, found, transformers.__version__), path)
    return [f"{name} {digest}" for name, digest in sorted(found.items()) if digest not in table.get(name, ())]
