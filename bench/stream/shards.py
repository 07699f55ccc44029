"""Shards: the files of a corpus, and the rows of each, read by `datasets` without downloads.

.txt: a row is a line; empty lines separate documents, other lines are sentences or paragraphs. .jsonl, .parquet, .arrow (what
`save_to_disk` of `datasets` writes): a row is a document, in the column "text". .txt and .jsonl may be compressed.
"""

import glob
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import fsspec
import pyarrow
from datasets import IterableDataset

from fastbert.errors import InputError

BUILDERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # of lines; fsspec's names
OF_LINES = ("text", "json")
COLUMN = "text"
ROWS = 1000  # rows of a table that is taken from `datasets`
READ_BYTES = 1 << 20  # of lines at once
SHOWN = 6


@dataclass(frozen=True)
class Shard:
    """A file and the builder of `datasets` that reads it."""

    path: str
    builder: str
    size: int

    @property
    def lines_are_sentences(self) -> bool:
        """Whether a row is a line of a document, and not a document."""
        return self.builder == "text"

    def rows(self, skip: int = 0) -> Iterator[list[str]]:
        """The texts of the rows behind the first `skip`, in lists. A missing text is "".

        Raises:
            InputError: the file cannot be read, or has no column "text" of strings. The message names the row.
        """
        if not self.size:
            return
        done = skip
        try:
            tables = iter(self._open().skip(skip).with_format("arrow").iter(batch_size=ROWS))
            while (table := next(tables, None)) is not None:
                texts = _texts(table)
                if texts is None:
                    self._refuse(table.schema, done + 1)
                yield texts
                done += len(texts)
        except (InputError, GeneratorExit):
            raise
        except StopIteration:  # from `datasets`, for JSON lines without a line
            return
        except Exception as error:  # whatever a decoder, parser or file system raises
            row = first_unreadable(self)
            place = f"row {row}" if row else f"behind row {done}"
            raise InputError(f"--data: {self.path}, {place}: cannot be read as {self.builder}: {_said(error)}") from None

    def _open(self) -> IterableDataset:
        # Not load_dataset, which reports each use to its authors' server.
        if self.builder == "arrow":
            return IterableDataset.from_file(self.path)
        pattern = glob.escape(self.path)
        if self.builder == "parquet":
            found = IterableDataset.from_parquet(pattern)
            has_texts = COLUMN in (found.features or ())
            return IterableDataset.from_parquet(pattern, columns=[COLUMN]) if has_texts else found
        if self.builder == "json":
            return IterableDataset.from_json(pattern, chunksize=READ_BYTES)
        # The encoding is UTF-8, without the mark that some editors put at the start.
        return IterableDataset.from_text(pattern, chunksize=READ_BYTES, encoding="utf-8-sig")

    def _refuse(self, schema: pyarrow.Schema, row: int) -> NoReturn:
        if COLUMN not in schema.names:
            names = ", ".join(schema.names[:SHOWN])
            raise InputError(f"--data: {self.path}, row {row}: expected a column {COLUMN!r}, found {names or 'none'}")
        raise InputError(f"--data: {self.path}, row {row}: expected text in {COLUMN!r}, found {schema.field(COLUMN).type}")


def find(data: Sequence[str]) -> tuple[Shard, ...]:
    """The shards that `data` names, in the order of their paths: files, folders (everything below that can be read), patterns.

    Raises:
        InputError: a name that stands for no file, or a file of another kind.
    """
    found: dict[str, Shard] = {}
    for name in data:
        path = Path(name)
        if path.is_dir():
            paths = [
                below for below in sorted(path.rglob("*")) if below.is_file() and _kind(below) and not _hidden(below, path)
            ]
        else:
            paths = (
                [path]
                if path.is_file()
                else [Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file()]
            )
        if not paths:
            kinds = f"no {', '.join(BUILDERS)} in it" if path.is_dir() else "no such file, folder or pattern with a match"
            raise InputError(f"--data: {name}: {kinds}")
        found |= {shard.path: shard for shard in map(_shard, paths)}
    return tuple(found[path] for path in sorted(found))


def fingerprint(shards: Sequence[Shard]) -> str:
    """Tells whether a resumed run has the same shards: their number, and a checksum of names and sizes (folders may move)."""
    content = json.dumps([[Path(shard.path).name, shard.size] for shard in shards])
    return f"{len(shards)} shards, {zlib.crc32(content.encode()):08x}"


def first_unreadable(shard: Shard) -> int | None:
    """The first line that is not UTF-8 or not JSON, counted from 1; None where lines do not say."""
    number = 0
    if shard.builder not in OF_LINES:
        return None
    try:
        with fsspec.open(shard.path, "rb", compression=COMPRESSED.get(Path(shard.path).suffix)) as file:
            for line in io.BufferedReader(file):
                text = line.decode()
                if shard.builder == "json" and text.strip():
                    json.loads(text)
                number += 1
    except Exception:
        return number + 1
    return None


def _kind(path: Path) -> str | None:
    """The builder for a file by its name, or None."""
    compressed = path.suffix in COMPRESSED
    builder = BUILDERS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if compressed and builder not in OF_LINES else builder


def _shard(path: Path) -> Shard:
    builder = _kind(path)
    if builder is None:
        wanted = f"{', '.join(BUILDERS)}, or lines with {', '.join(COMPRESSED)}"
        raise InputError(f"--data: {path}: expected a file whose name ends in {wanted}")
    if path.suffix == ".zst" and find_spec("zstandard") is None:
        raise InputError(f"--data: {path}: not installed: zstandard; to fix: pip install zstandard")
    return Shard(str(path), builder, path.stat().st_size)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _texts(table: pyarrow.Table) -> list[str] | None:
    """The column of texts; None if there is none."""
    if COLUMN not in table.schema.names:
        return None
    kind = table.schema.field(COLUMN).type
    if pyarrow.types.is_null(kind):
        return [""] * table.num_rows
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return None
    return [text or "" for text in table[COLUMN].to_pylist()]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
