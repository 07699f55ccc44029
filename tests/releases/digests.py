"""The table of digests: what is missing in it for the release of transformers that is installed."""

import json
from pathlib import Path

import transformers
from packaging.version import Version

from fastbert import forwards
from fastbert.layers.stock import covered

TABLE = Path(forwards.__file__).parent / "data/forwards.json"
Table = dict[str, dict[str, str]]


def of_this_release() -> dict[str, str]:
    """Digest by qualified name of all that this release has."""
    return {forwards.label(*pair): forwards.digest(getattr(*pair)) for pair in covered()}


def added(table: Table, found: dict[str, str], release: str) -> Table:
    """`table` with the digests of a release; each keeps the oldest release that it was seen in."""
    result = {name: dict(digests) for name, digests in table.items()}
    for name, digest in found.items():
        releases = result.setdefault(name, {})
        releases[digest] = min(releases.get(digest, release), release, key=Version)
    return result


def write(table: Table, path: Path = TABLE) -> None:
    """Sorted by name and release, a digest a line."""
    ordered = {name: dict(sorted(table[name].items(), key=lambda item: (Version(item[1]), item[0]))) for name in sorted(table)}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def update(path: Path = TABLE) -> list[str]:
    """Add this release's digests to the table at `path`; a line for each that it did not have."""
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    found = of_this_release()
    if unreadable := [name for name, digest in found.items() if digest is None]:
        raise SystemExit(f"not transformers' own, or without source: {', '.join(unreadable)}")
    write(added(table, found, transformers.__version__), path)
    return [f"{name} {digest}" for name, digest in sorted(found.items()) if digest not in table.get(name, ())]
