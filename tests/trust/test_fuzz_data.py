"""Every reader of a user's rows against damaged files: rows, or one line that names the file; never another error."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.core.lengths import LengthsError, from_file
from bench.core.schema import ResultsError, read
from bench.train import data
from fastbert.errors import InputError
from tests.bench.report.test_report import SAMPLE
from tests.bench.train.training import FILES

CHECKS = [HealthCheck.function_scoped_fixture]  # each content overwrites the file
PROFILE = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": CHECKS}
MARKS = [b"\0", b"\xff", b"\n", b"\r", b"\t", b",", b'"', b"{", b"]"]
PIECES = st.sampled_from([*MARKS, b"[[[[", b"\\ud800", b"-1", b"1e999", b"null"])


@st.composite
def damaged(draw, path: Path, most: int = 2000) -> bytes:
    """The beginning of a good file with a few pieces put in or cut out."""
    content = path.read_bytes()[:most] if draw(st.booleans()) else path.read_bytes()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 20))
        content = content[:start] + draw(PIECES | st.binary(max_size=8)) + content[start + gone :]
    return content


def reads_or_refuses(read, errors, content, path):
    path.write_bytes(content)
    try:
        read(path)
    except errors as error:
        assert "\n" not in str(error) and path.name in str(error)


def check_rows(task, examples, path):
    @settings(**PROFILE, max_examples=examples)
    @given(damaged(FILES[task]) | st.binary(max_size=60))
    def check(content):
        reads_or_refuses(lambda file: data.read(task, file), InputError, content, path)

    check()


@pytest.mark.parametrize("task", FILES)
def test_rows(task, tmp_path):
    check_rows(task, 25, tmp_path / f"file{FILES[task].suffix}")


@pytest.mark.long
@pytest.mark.parametrize("task", FILES)
def test_rows_long(task, tmp_path):
    check_rows(task, 5000, tmp_path / f"file{FILES[task].suffix}")


@settings(**PROFILE, max_examples=25)
@example(b"[" * 100_000)
@example(b'{"schema": [1]}')
@given(damaged(SAMPLE) | st.binary(max_size=60))
def test_results(tmp_path, content):
    reads_or_refuses(read, ResultsError, content, tmp_path / "results.json")


@settings(**PROFILE, max_examples=25)
@example("²".encode())
@example(b"9" * 5000)
@given(st.binary(max_size=60) | st.text(max_size=20).map(str.encode))
def test_lengths(tmp_path, content):
    reads_or_refuses(from_file, LengthsError, content, tmp_path / "lengths.txt")
