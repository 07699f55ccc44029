"""Adds the digests of the installed releases of transformers and sentence-transformers to their tables."""

import json
from collections.abc import Iterable
from pathlib import Path

import transformers
from packaging.version import Version

from fastbert import forwards
from fastbert.layers.stock import covered

TABLE = Path(forwards.__file__).parent / "data/forwards.json"
SENTENCE_TRANSFORMERS = TABLE.with_name("forwards_sentence_transformers.json")
Table = dict[str, dict[str, str]]


def of_this_release(pairs: Iterable[forwards.Pair] | None = None) -> dict[str, str]:
    """The digests of the covered functions (or of `pairs`) that this release has, by qualified name."""
    return {forwards.label(*pair): forwards.digest(getattr(*pair)) for pair in (covered() if pairs is None else pairs)}


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
    """Add the digests of this release of transformers to the table at `path`; returns one line per new digest."""
    return _add(path, of_this_release(), transformers.__version__)


def update_sentence_transformers(path: Path = SENTENCE_TRANSFORMERS) -> list[str]:
    """The same for sentence-transformers, if it is installed."""
    try:
        import sentence_transformers
    except ImportError:
        return []
    from fastbert.integrations.sentence_transformers import CODE

    pairs = [pair for code in CODE.values() for pair in code.pairs if hasattr(*pair)]
    return _add(path, of_this_release(pairs), sentence_transformers.__version__)


def _add(path: Path, found: dict[str, str], release: str) -> list[str]:
    table: Table = json.loads(path.read_text()) if path.exists() else {}
    if unreadable := [name for name, digest in found.items() if digest is None]:
        raise SystemExit(f"not the library's own, or without source: {', '.join(unreadable)}")
    write(added(table, found, release), path)
    return [f"{name} {digest}" for name, digest in sorted(found.items()) if digest not in table.get(name, ())]
