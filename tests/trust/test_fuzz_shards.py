"""Shards of a stream against damaged files: rows, or one line that names the shard; never another error."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from bench.stream.shards import find
from fastbert.errors import InputError
from tests.trust.test_fuzz_data import PROFILE, damaged, reads_or_refuses

LINES = b"One two.\nThree four.\n\n" * 20
OBJECTS = b"".join(json.dumps({"text": f"One {i}. Two."}).encode() + b"\n" for i in range(20))


def written(write):
    file = io.BytesIO()
    write(pyarrow.table({"text": [f"One {i}. Two." for i in range(20)]}), file)
    return file.getvalue()


GOOD = {
    "a.txt": LINES,
    "a.txt.gz": gzip.compress(LINES, mtime=0),
    "a.txt.bz2": bz2.compress(LINES),
    "a.txt.xz": lzma.compress(LINES),
    "a.jsonl": OBJECTS,
    "a.jsonl.gz": gzip.compress(OBJECTS, mtime=0),
    "a.parquet": written(parquet.write_table),
    "a.arrow": written(lambda table, file: ipc.new_stream(file, table.schema).write_table(table)),
}


def read(path):
    for shard in find([str(path)]):
        for rows in shard.rows():
            assert all(isinstance(row, str) for row in rows)


def check_shards(name, examples, folder):
    good = folder / "good"
    good.write_bytes(GOOD[name])
    (folder / name).write_bytes(GOOD[name])
    read(folder / name)

    @settings(**PROFILE, max_examples=examples)
    @given(damaged(good) | st.integers(0, len(GOOD[name])).map(lambda end: GOOD[name][:end]) | st.binary(max_size=60))
    def check(content):
        reads_or_refuses(read, InputError, content, folder / name)

    check()


@pytest.mark.parametrize("name", GOOD)
def test_shards(name, tmp_path):
    check_shards(name, 8, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", GOOD)
def test_shards_long(name, tmp_path):
    check_shards(name, 2000, tmp_path)
