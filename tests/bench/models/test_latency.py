"""The latency of requests: its streams and checks in dry runs, its times on a clock of ours, its tables."""

import dataclasses
from pathlib import Path

import pytest
import torch

import fastbert
from bench.core import schema, timing
from bench.core.records import LatencyRecord, Spread
from bench.models import gate, latency, workloads
from bench.models.latency import Stream, run
from bench.models.workloads import GRAPHED, Workload
from bench.report import figures, tables
from tests.bench.models.test_graph_lanes import replaying

SAMPLE = Path(__file__).parents[1] / "data/invented.json"
FULL = workloads.tiny(Workload("tiny", "classification", "infer", 4, 16, 1.0))
MIXED = dataclasses.replace(FULL, batch=2, fill=0.5)


def record(lane="stock", p50=2e-3, p99=5e-3, **case):
    given = {"batch": 1, "seqlen": 128, "fill": 1.0, "lengths": "full"} | case
    spread = Spread(p50 * 0.9, p50, p50 * 1.1, 200)
    return LatencyRecord(
        lane,
        "ok",
        None,
        spread,
        [p50],
        1 << 20,
        "BERT-base",
        "classification",
        "bf16",
        **given,
        p99=p99,
        first_pass_seconds=0.5,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
class TestDryRuns:
    @pytest.mark.parametrize(
        ("stream", "lanes"),
        [
            (FULL, latency.LANES),
            (MIXED, (*latency.FIRST_LANES, "eager")),
            pytest.param(MIXED, latency.COMPILED_LANES, marks=pytest.mark.long),
        ],
    )
    def test_every_lane_is_walked(self, stream, lanes):
        found = {r.lane: (r.status, r.reason) for r in run([stream], lanes)}
        assert found == dict.fromkeys(lanes, ("dry-run", None))

    def test_a_lane_without_a_replay_fails(self, monkeypatch):
        monkeypatch.setattr(fastbert, "graphed", lambda model: model)
        (found,) = run([FULL], [GRAPHED])
        assert found.status == "failed" and gate.NOT_REPLAYED in found.reason

    def test_an_answer_to_a_former_request_fails(self, monkeypatch):
        answers = []

        def former(call, output):
            answers.append(output)
            return answers[max(len(answers) - 2, 0)]

        monkeypatch.setattr(fastbert, "graphed", lambda model: replaying(model, former))
        (found,) = run([FULL], [GRAPHED])
        assert found.status == "failed" and "differ from eager: logits" in found.reason

    def test_one_model_serves_all_streams_but_where_it_is_compiled(self, monkeypatch):
        made = []
        monkeypatch.setattr(workloads, "compiled", lambda model, lane, dynamic: model)  # takes seconds
        make = workloads.make
        monkeypatch.setattr(workloads, "make", lambda w, lane, device: made.append(lane) or make(w, lane, device))
        assert len(list(run([FULL, MIXED], ["stock", "stock + compile"]))) == 4
        assert made.count(workloads.LANES["stock"]) == 1 and made.count(workloads.LANES["stock + compile"]) == 2


def test_mixed_requests_have_lengths_of_their_own():
    stream = Stream(MIXED, "cpu")
    widths = [request["input_ids"].shape[1] for request in stream.requests]
    assert len(set(widths)) > 1 and max(widths) <= 16
    checked = [request["input_ids"] for request in stream.checked]
    assert sorted({x.shape[1] for x in checked}) == sorted(set(widths)), "shortest, middle, longest"
    assert not any(torch.equal(x, y["input_ids"]) for x in checked for y in stream.requests if x.shape == y["input_ids"].shape)
    assert {request["input_ids"].shape for request in Stream(FULL, "cpu").requests} == {(4, 16)}


def test_no_stream_is_begun_past_the_budget():
    assert not list(run([FULL], ["stock"], budget=0.0))


def test_the_streams_of_the_readme_are_those_of_the_grid():
    grid = list(workloads.requests())
    assert [(w.batch, w.seqlen, w.fill) for w in workloads.of_the_page()] == [
        (1, 128, 1.0),
        (8, 128, 1.0),
        (1, 512, workloads.MIXED_FILL),
    ]
    assert all(w in grid for w in workloads.of_the_page()) and len(grid) == 12


def test_a_response_ends_with_the_call(monkeypatch):
    """One request in fifty is slow: that is p99, not the median, and the wait for an idle GPU is not counted."""
    now = [0.0]

    def idle():
        now[0] += 1.0

    def answer(i):
        now[0] += 1.0 if i % 50 == 49 else 0.01

    monkeypatch.setattr(torch.cuda, "synchronize", idle)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    spread, runs, p99 = timing.measure_responses(answer, seconds=0.1, fewest=200)
    assert spread.median == pytest.approx(0.01) and spread.rounds >= 200 and len(runs) == timing.BLOCKS
    assert p99 == pytest.approx(1.0)


def test_written_and_read_again(tmp_path):
    results = dataclasses.replace(schema.read(SAMPLE), latency=[record()])
    schema.write(results, tmp_path / "results.json")
    assert schema.read(tmp_path / "results.json") == results
    for wrong in (record(p99=1e-3), record(p99=None)):
        with pytest.raises(ValueError, match="p99"):
            schema.add(results, [wrong])


def test_tables():
    records = [record(), record("stock + compile", 1e-3), record("stock + reduce-overhead", 0.5e-3, 0.6e-3)]
    records += [record("fastbert", 1.5e-3), dataclasses.replace(record(GRAPHED), status="failed", seconds=None, p99=None)]
    results = dataclasses.replace(schema.read(SAMPLE), latency=[*records, record(batch=2), record(seqlen=512, lengths="mixed")])
    rows = tables.latency(results).markdown().splitlines()
    assert rows[2:] == [
        "| BERT-base classification, 1 x 128 tokens | 2 / 5 ms | 0.5 / 0.6 ms | 1.5 / 5 ms | failed its check |",
        "| BERT-base classification, 1 x up to 512 tokens, mixed | 2 / 5 ms | not measured | not measured | not measured |",
    ]
    every = tables.latencies(results).markdown()
    assert "| stock + reduce-overhead | 0.5 ms [0.45, 0.55] | 0.6 ms | 2,000 | 0.50 s | 4.00x |" in every
    assert every.count("| stock |") == 3 and "failed its check" in every


def test_picture(tmp_path):
    results = dataclasses.replace(schema.read(SAMPLE), latency=[record(), record(seqlen=512, p50=4e-3)])
    assert "latency" in figures.with_data(results) and "latency" not in figures.with_data(schema.read(SAMPLE))
    (path,) = figures.draw(results, tmp_path, only=["latency"])
    assert path.name == "latency.png" and path.stat().st_size > 10_000
