"""`python -m bench input`: what it measures, prints and writes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core.schema import parse
from bench.stream import measure
from bench.stream.measure import InputRecord, InputResults
from tests.bench.stream.corpora import make_documents, write
from tests.bench.train.training import save_model

RECORD = InputRecord(
    **{"task": "mlm", "whole_words": False, "max_length": 512, "batch_tokens": 16384, "readers": 8, "workers": 2},
    **{"cpu": "a CPU", "cores": 4, "batches": 20, "rows": 1000, "tokens": 500_000, "seconds": 2.0},
    **{"phases": {"read": 1e-7, "tokenise": 7e-7, "build": 0.0, "mask": 1e-7, "rest": 1e-7}, "collect": 2e-7},
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    data = write(folder / "shards", make_documents(200, words=12), 4)
    return ["input", "--data", *data, "--model", save_model(folder / "model"), "--max-length", 32, "--batch", 8]


def invoke(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_measures_and_writes(workers, options, tmp_path):
    more = ("--task", "pretraining", "--whole-words", "--seconds", 0.2, "--workers", workers, "--out", tmp_path)
    code, text = invoke(*options, *more)
    assert code == 0, text
    record = parse(InputResults, (tmp_path / "results.json").read_bytes(), "results").record
    assert (record.task, record.whole_words, record.workers, record.readers) == ("pretraining", True, workers, 8)
    assert record.batches >= 2 and record.batch_tokens == 256 and record.seconds >= 0.2
    assert abs(record.tokens - 256 * record.batches) <= 8 * 32 and record.rows > record.batches
    assert record.phases.keys() == measure.PHASES.keys() and all(seconds > 0 for seconds in record.phases.values())
    assert (record.collect > 0) == (workers > 0) and record.cpu
    assert "us of a core per 1,000 tokens" in text and f"({record.rows:,} rows in" in text


def test_a_fault_is_one_line(options):
    code, text = invoke(*options, "--workers", 9)
    assert code == 2 and text == "error: --workers: expected at most the 8 readers (--readers), got 9\n"


def test_what_follows_from_the_measurement():
    assert measure.lines(RECORD) == [
        "2 worker processes, 8 readers, 4 cores: 500 rows/s of 500 tokens on average, 250,000 tokens/s, 125,000 of each worker "
        "(1,000 rows in 2.0 s)",
        "a core makes 1,000,000 tokens/s: 1,953 rows of 512",
        "an H100 that trains on 1,000 rows of 512 a second needs 0.5 such cores for workers, and 0.10 of one in its training "
        "process",
    ]
    assert measure.lines(replace(RECORD, workers=1))[0].startswith("1 worker process, ")
    assert measure.table(RECORD).row_count == len(measure.PHASES) + 1


def test_seconds_are_divided_by_what_they_were_spent_on():
    numbers = Counter(read=1.0, tokenise=4.0, build=0.5, made=1000, mask=2.0, tokens=500, rows=10, all=8.5)
    assert measure.per_token(numbers) == {"read": 1e-3, "tokenise": 4e-3, "build": 5e-4, "mask": 4e-3, "rest": 2e-3}


@pytest.mark.parametrize(
    ("name", "tokens", "cores"),
    [
        ("long-mlm", "555,000 tokens for MLM", "0.9"),
        ("long-mlm-words", "573,000 with whole words", "0.9"),
        ("long-pretraining", "638,000 in pairs", "0.8"),
        ("long-pretraining-words", "590,000 with both", "0.9"),
        ("short-pretraining", "353,000 tokens", "1.5"),
    ],
)
def test_the_page_has_the_measured_numbers(name, tokens, cores):
    root = Path(__file__).parents[3]
    record = parse(InputResults, (root / "bench" / "results" / "input" / f"{name}.json").read_bytes(), "results").record
    said = f"{round(record.of_a_core, -3):,.0f}"
    assert tokens.startswith(said) and tokens in (root / "docs" / "scaling.md").read_text()
    assert f"{record.cores_for_gpu[0]:.1f}" == cores
