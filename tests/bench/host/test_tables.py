"""The host's table, its targets, and which document a pretended GPU's figures may stand in. All numbers are invented."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core import environment, schema
from bench.core.records import HostRecord, Results, Spread
from bench.host import cases, tables, targets
from bench.report import documents
from bench.report.tables import host
from tests.bench.report.test_report import nothing


def record(lane, runs=(1e-3, 2e-3), peak=1 << 30, name=cases.TRAINING.name, launches=None) -> HostRecord:
    spread = Spread(min(runs), sorted(runs)[len(runs) // 2], max(runs), 9)
    return HostRecord(
        lane=lane,
        status="ok",
        reason=None,
        seconds=spread,
        runs=list(runs),
        peak_bytes=peak,
        name=name,
        wall=spread,
        wall_runs=list(runs),
        parts={"forward": list(runs), "backward": [2 * x for x in runs], "optimizer": [3 * runs[0], runs[1]]},
        launches=launches or {"ATen": {"add": 300}, "Triton": {"kernel": 79}, "libraries": {"mm": 1}, "copies": {"Memset": 9}},
    )


def pretended(records) -> Results:
    where = dataclasses.replace(nothing().environment, gpu="H100", pretended=True)
    return Results(where, host=list(records))


STOCK = record("stock", (4e-3, 8e-3))


def test_ratios_are_those_of_a_turn():
    """A machine that was busy in one turn slowed both lanes: the ratio stays."""
    busy = record("fastbert, padded", (20e-3, 4e-3), 1 << 29)
    assert tables.cpu_ratio(busy, record("stock", (40e-3, 8e-3))) == pytest.approx(0.5)
    assert tables.peak_ratio(busy, STOCK) == 0.5
    assert tables.cpu_ratio(busy, None) is None and tables.peak_ratio(busy, None) is None


def test_table():
    ours = record("fastbert, padded", (1e-3, 4e-3), 1 << 29)
    failed = dataclasses.replace(ours, lane="fastbert, packed", status="error", reason="TypeError: x\nmore", seconds=None)
    stock, fast, none = host(pretended([STOCK, ours, failed])).markdown().splitlines()[2:]
    assert "| 0.38 [0.25, 0.50] | 0.38, 0.38, 0.38 | 0.38 | 380 | 300 | 79 | 1 | 9 | 0.500 | 0.50 |" in fast
    assert "| stock |  |  |  | 380 |" in stock
    assert "did not run: TypeError: x |" in none and "more" not in none
    assert tables.names(ours)[0].split() == ["300", "ATen", "add"]


def test_a_figure_that_misses_its_target_is_named():
    good = record("fastbert, padded", (2e-3, 4e-3))
    graphed = record("fastbert, graphed step", (2e-4, 4e-4))
    assert targets.check([STOCK, good, graphed]) == (
        ["SeqCls B=32 S=128 training, fastbert, packed: CPU time / stock: no figure, expected at most 0.75"],
        4,
    )
    slow = record("fastbert, padded", (3e-3, 6e-3), launches={"ATen": {"add": 381}})
    missed, count = targets.check([STOCK, slow, graphed, record("fastbert, packed", (2e-3, 4e-3))])
    assert count == 4 and missed == [
        "SeqCls B=32 S=128 training, fastbert, padded: CPU time / stock: 0.75, expected at most 0.6",
        "SeqCls B=32 S=128 training, fastbert, padded: launches: 381, expected at most 380",
    ]
    mlm = cases.MLM_FULL_ROWS.name
    large = record("fastbert, padded, no logits", peak=1 << 29, name=mlm)
    assert targets.check([record("stock", name=mlm), large])[0] == [
        f"{mlm}, fastbert, padded, no logits: peak memory / stock: 0.5, expected at most 0.48"
    ]


@pytest.mark.parametrize(("runs", "status"), [((2e-3, 4e-3), 0), ((3e-3, 6e-3), 1)])
def test_check_is_the_exit_status(monkeypatch, tmp_path, runs, status):
    def run(names, **options) -> Iterator[HostRecord]:
        assert names == [cases.TRAINING.name] and options["seconds"] == 2.0
        graphed = record("fastbert, graphed step", (2e-4, 4e-4))
        yield from (STOCK, record("fastbert, padded", runs), record("fastbert, packed", (2e-3, 4e-3)), graphed)

    monkeypatch.setattr("bench.host.run.run", run)
    monkeypatch.setattr(cases, "CASES", {cases.TRAINING.name: cases.TRAINING})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "read", lambda: pretended([]).environment)
    out = tmp_path / "host.json"
    done = CliRunner().invoke(app, ["host", "--check", "--seconds", "2", "--json", str(out)])
    assert done.exit_code == status, done.output
    assert "A pretended H100" in done.output and f"{4 - status} of 4 targets reached" in done.output
    assert len(schema.read(out).host) == 4


DOCUMENT = """<!-- bench:headline -->
of a GPU
<!-- /bench:headline -->
<!-- bench:host-pretended -->
of no GPU
<!-- /bench:host-pretended -->
"""


def test_a_pretended_gpu_fills_its_own_table_only():
    text = documents.fill(DOCUMENT, pretended([STOCK, record("fastbert, padded")]))
    assert "of a GPU" in text and "of no GPU" not in text and "0.25" in text and "A pretended H100" in text
    text = documents.fill(DOCUMENT, nothing())
    assert "of a GPU" not in text and "of no GPU" in text


def test_calls_of_encode_have_a_table_of_their_own():
    """A run of one kind of case leaves the other's table as it is."""
    blocks = DOCUMENT + "<!-- bench:host-encode-pretended -->\nof encode\n<!-- /bench:host-encode-pretended -->\n"
    encode = [record(lane, name=cases.ENCODE.name) for lane in ("stock", "fastbert")]
    text = documents.fill(blocks, pretended(encode))
    assert "of no GPU" in text and "of encode" not in text and text.count(cases.ENCODE.name) == 2
    text = documents.fill(blocks, pretended([STOCK]))
    assert "of no GPU" not in text and "of encode" in text
    text = documents.fill(blocks, pretended([STOCK, *encode]))
    assert text.count(cases.TRAINING.name) == 1 and text.count(cases.ENCODE.name) == 2
    assert {case.name.startswith(tables.ENCODE) for case in cases.CASES.values() if case.mode == "encode"} == {True}


def test_a_pretended_gpu_is_not_mixed_with_the_one_that_it_is_like(tmp_path):
    real = dataclasses.replace(pretended([STOCK]), environment=dataclasses.replace(nothing().environment, gpu="H100"))
    schema.write(pretended([STOCK]), tmp_path / "a.json")
    schema.write(real, tmp_path / "b.json")
    with pytest.raises(schema.ResultsError, match="pretended H100.*one at a time"):
        schema.read_all([tmp_path / "b.json", tmp_path / "a.json"])
    again = schema.read_all([tmp_path / "a.json", tmp_path / "a.json"])
    assert again.host == [STOCK]
