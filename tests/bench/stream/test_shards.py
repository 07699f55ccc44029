"""Shards of every kind have the same documents, and what cannot be read is one line with the shard and its row."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from bench.stream.documents import Place, blocks
from bench.stream.shards import find, fingerprint
from fastbert.errors import InputError
from tests.bench.stream.corpora import make_documents

DOCUMENTS = make_documents(40)
LINES = "\n".join("".join(f"{sentence}\n" for sentence in document) for document in DOCUMENTS)
OBJECTS = [{"number": i, "text": "\n".join(document)} for i, document in enumerate(DOCUMENTS)]


def write_saved(path: Path) -> None:
    datasets.Dataset.from_list(OBJECTS).save_to_disk(path)


KINDS = {
    "lines.txt": lambda path: path.write_text(LINES),
    "crlf.txt": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode()),
    "lines.txt.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "lines.txt.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "lines.txt.bz2": lambda path: path.write_bytes(bz2.compress(LINES.encode())),
    "o.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in OBJECTS)),
    "o.jsonl.gz": lambda path: path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in OBJECTS).encode())),
    "o.parquet": lambda path: datasets.Dataset.from_list(OBJECTS).to_parquet(path),
    "saved": write_saved,
    "[odd] *name?.txt": lambda path: path.write_text(LINES),
}


def read(data, size=10**9):
    """The documents of the first block of the only reader."""
    return next(blocks(find([str(data)]), 0, 1, 0, size, Place()))[0]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_the_same_documents(name, tmp_path):
    KINDS[name](tmp_path / name)
    assert read(tmp_path / name) == DOCUMENTS
    (shard,) = find([str(tmp_path)])
    rows = [row for some in shard.rows() for row in some]
    for skip in (0, 1, len(rows) - 1, len(rows), len(rows) + 5):
        assert [row for some in shard.rows(skip) for row in some] == rows[skip:]


def test_names_folders_and_patterns_are_found_once_and_in_order(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", "b/notes.md", "b/dataset_info.json", "b/.hidden/3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    names = [str(tmp_path / "b"), str(tmp_path / "**/2.*"), str(tmp_path / "a.txt"), str(tmp_path)]
    assert [Path(shard.path).relative_to(tmp_path).as_posix() for shard in find(names)] == ["a.txt", "b/1.jsonl", "b/2.txt"]
    before = fingerprint(find(names))
    assert before.startswith("3 shards, ")
    (tmp_path / "a.txt").write_text("more")
    assert fingerprint(find(names)) != before


FAULTS = {
    "bad.txt": (b"fine\n\n" * 3 + b"\xff\xfe\n", "row 7: cannot be read as text: UnicodeDecodeError"),
    "cut.txt.gz": (gzip.compress(LINES.encode())[:-90], "cannot be read as text: EOFError: Compressed file ended"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "row 2: cannot be read as json"),
    "other.jsonl": (b'{"body": "a"}\n', "row 1: expected a column 'text', found body"),
    "number.jsonl": (b'{"text": 3}\n', "row 1: expected text in 'text', found int64"),
    "bad.parquet": (b"no", "behind row 0: cannot be read as parquet"),
    "other.parquet": (None, "row 1: expected a column 'text', found body"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    content, said = FAULTS[name]
    if content is None:
        datasets.Dataset.from_list([{"body": "a"}]).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"--data: {tmp_path / name}, ") and said in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "no such file, folder or pattern"),
        ("*.txt", "no such file, folder or pattern"),
        ("", "no .txt, .jsonl"),
        ("a.csv", "expected a file whose name ends in .txt, .jsonl"),
        ("a.parquet.gz", "expected a file whose name ends in"),
    ],
)
def test_a_name_without_a_shard_is_one_line(name, said, tmp_path):
    for file in ("a.csv", "a.parquet.gz"):
        (tmp_path / file).write_text("x")
    with pytest.raises(InputError, match="--data: ") as caught:
        find([str(tmp_path / name)])
    assert said in str(caught.value)


def test_zstd_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setattr("bench.stream.shards.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed: zstandard; to fix: pip install zstandard"):
        find([str(tmp_path / "a.txt.zst")])


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "blank.txt", "null.jsonl"])
def test_empty_shards_are_passed_over_and_a_corpus_of_them_is_refused(name, tmp_path):
    content = {"empty": "", "blank": "\n \n", "null": '{"text": null}\n'}[name.split(".")[0]]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="reader 0 of 1 finds no text"):
        read(tmp_path / name)
    (tmp_path / "lines.txt").write_text(LINES)
    assert read(tmp_path) == DOCUMENTS
