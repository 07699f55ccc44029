"""The host's time: lanes in turns on a device that is made up here, the reads that are stood in for, and a GPU's own."""

import dataclasses
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import masking_utils

import fastbert
from bench.core import pretended
from bench.core.pretended import true_reads
from bench.encode import cases as encoding
from bench.encode import flash
from bench.host import cases
from bench.host.cases import CASES, LANES
from bench.host.counts import kernels
from bench.host.encode_step import EncodeStep
from bench.host.run import _timed, measure, run
from bench.host.step import BACKWARD, FORWARD, OPTIMIZER, PARTS
from bench.host.targets import TARGETS
from bench.runner import plan
from fastbert.kernels.core import launch
from fastbert.layers import counts, embeddings, mlm_heads, packing_plan

CASE = dataclasses.replace(cases.TRAINING, lanes=cases.CLASSIFIER)
STOCK, PADDED, PACKED = CASE.lanes


class Device:
    """Stands in for a GPU: steps take the time that their lane is said to take, and can fail."""

    def __init__(self, monkeypatch):
        self.now, self.calls, self.made, self.alive = 0.0, [], [], 0
        self.cpu = {STOCK: 2.0, PADDED: 1.0, PACKED: 3.0}
        self.fails = {}  # lane -> at which of its steps
        self.launching = {PADDED, PACKED}
        device = self

        class Step:
            def __init__(self, case, lane, where):
                device.made.append((lane, device.alive))
                device.alive += 1
                self.lane = lane

            def __del__(self):
                device.alive -= 1

            @contextmanager
            def surroundings(self):
                yield

            def __call__(self, issued=str):
                device.calls.append(self.lane)
                if device.calls.count(self.lane) == device.fails.get(self.lane):
                    raise torch.OutOfMemoryError("out of memory\nof 80 GiB")
                for part in PARTS:
                    device.now += device.cpu[self.lane] / 4 * (1 + (part == BACKWARD))
                    issued(part)
                launch.counts["kernel"] += self.lane in device.launching

        def of_step(step, where):
            step()
            return {"ATen": {"add": 3}}

        monkeypatch.setitem(CASES, CASE.name, CASE)
        clock = SimpleNamespace(process_time=lambda: self.now, perf_counter=lambda: 2 * self.now, monotonic=lambda: self.now)
        monkeypatch.setattr("bench.host.run.time", clock)
        monkeypatch.setattr(launch, "counts", Counter())
        monkeypatch.setattr("bench.host.run.Step", Step)
        monkeypatch.setattr(
            "bench.core.timing.gc", SimpleNamespace(collect=lambda: None)
        )  # takes long beside all that tests hold
        monkeypatch.setattr("bench.host.counts.of_step", of_step)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1 << 30)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def by_lane(records):
    return {record.lane: record for record in records}


def test_lanes_take_turns_and_are_timed_each_by_itself(device):
    records = by_lane(run([CASE.name], seconds=60.0, rounds=3))
    assert list(records) == list(CASE.lanes) and {record.status for record in records.values()} == {"ok"}
    for lane, record in records.items():
        cpu = device.cpu[lane]
        assert record.seconds.median == cpu and record.runs == [cpu] * 3
        assert record.wall.median == 2 * cpu and record.wall_runs == [2 * cpu] * 3
        assert record.parts == {FORWARD: [cpu / 4] * 3, BACKWARD: [cpu / 2] * 3, OPTIMIZER: [cpu / 4] * 3}
        assert record.peak_bytes == 1 << 30 and record.launches["ATen"] == {"add": 3}
    turns = [lane for i, lane in enumerate(device.calls) if i == 0 or device.calls[i - 1] != lane]
    assert turns[-9:] == [STOCK, PADDED, PACKED] * 3


def test_memory_is_that_of_one_lane_at_a_time(device):
    list(run([CASE.name], seconds=1.0, rounds=2))
    assert device.made[:3] == [(STOCK, 0), (PADDED, 0), (PACKED, 0)], "the lane before is gone"
    assert device.alive == 0, "nothing is left for the next case"


@pytest.mark.parametrize("step", [2, 9, 17], ids=["alone", "before the turns", "in its second turn"])
def test_one_lanes_failure_is_not_the_others(device, step):
    device.fails[PADDED] = step
    records = by_lane(run([CASE.name], seconds=6.0, rounds=4))
    assert records[PADDED].status == "error" and records[PADDED].seconds is None
    assert records[PADDED].reason.startswith("OutOfMemoryError: out of memory\nTraceback")
    assert records[STOCK].status == records[PACKED].status == "ok"


def test_a_lane_without_a_kernel_fails(device):
    device.launching = {PADDED}
    records = by_lane(run([CASE.name], seconds=6.0, rounds=2))
    assert records[STOCK].status == records[PADDED].status == "ok"
    assert (records[PACKED].status, records[PACKED].reason) == ("failed", "no kernel was launched")


@pytest.mark.parametrize(
    ("of_step", "said"),
    [(lambda step, where: 1 / 0, "launches were not counted: division by zero"), (lambda step, where: {}, "saw no launches")],
)
def test_a_profiler_that_does_not_work_costs_the_launches_only(device, monkeypatch, of_step, said):
    monkeypatch.setattr("bench.host.counts.of_step", of_step)
    for record in run([CASE.name], seconds=6.0, rounds=2):
        assert record.status == "ok" and record.seconds and record.launches == {} and said in record.reason


def test_no_case_is_begun_past_the_budget(device):
    records = list(run(list(CASES)[:1] * 3, seconds=10.0, rounds=2, budget=1.0))
    assert len(records) == len(CASE.lanes)


def test_compiled_on_request(device):
    device.cpu[cases.COMPILED] = 1.0
    assert cases.COMPILED in by_lane(run([CASE.name], seconds=1.0, rounds=2, compiled=True))


def test_it_comes_after_the_headline_models_in_the_one_call_run_and_cheap():
    jobs = list(plan.gpu_plan(480.0))
    place = next(i for i, job in enumerate(jobs) if job.name == "host")
    assert jobs[place].cap <= 45.0 and jobs[place].until < 0.8
    assert {job.name.split(":")[0] for job in jobs[:place]} == {"ceilings", "caches", "tests", "model", "latency", "encode"}
    assert not any("BERT-large" in job.name for job in jobs[:place])
    assert set(jobs[place].run.args[0]["names"]) == set(CASES)


def test_targets_are_of_lanes_that_are_measured():
    assert all(target.lane in target.case.lanes and target.case in CASES.values() for target in TARGETS)
    known = {cases.HostCase: LANES, cases.EncodeHostCase: encoding.LANES}
    assert all(lane in known[type(case)] for case in CASES.values() for lane in case.lanes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
@pytest.mark.parametrize("case", [cases.INFERENCE_1, cases.INFERENCE_8, cases.TRAINING, cases.MLM], ids=lambda case: case.name)
def test_lanes_of_graphs_replay_them(case):
    lane = case.lanes[-1]
    (record,) = measure(dataclasses.replace(case.tiny(), lanes=(lane,)), 1.0, 1, False, "cpu")
    assert lane in (cases.GRAPHED, cases.GRAPHED_STEP) and (record.status, record.reason) == ("dry-run", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
class TestEncode:
    def test_every_lane_encodes(self):
        found = by_lane(measure(cases.ENCODE.tiny(), 1.0, 1, True, "cpu"))
        assert {lane: (record.status, record.reason) for lane, record in found.items()} == dict.fromkeys(
            cases.ENCODE.lanes, ("dry-run", None)
        ), "and none of torch.compile"
        assert all(bool(record.launches["Triton"]) == lane.startswith("fastbert") for lane, record in found.items())

    def test_parts_are_those_of_each_batch(self):
        with flash.available():
            step = EncodeStep(dataclasses.replace(cases.ENCODE.tiny(), lanes=()), cases.STOCK, "cpu")
        parts = []
        with step.surroundings():
            step(parts.append)
        assert parts == ["tokenizer", "model"] * 2, "six texts are two batches"

    def test_without_the_library_a_lane_is_absent(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        (record,) = measure(dataclasses.replace(cases.ENCODE_QUERY.tiny(), lanes=(cases.STOCK,)), 1.0, 1, False, "cpu")
        assert record.status == "absent" and "needs sentence-transformers 6" in record.reason


def test_a_part_in_pieces_has_the_time_of_all_of_them(device):
    def step(issued):
        for part, seconds in (("tokenizer", 1.0), ("model", 2.0)) * 3:
            device.now += seconds
            issued(part)

    found = _timed(step)
    assert (found.cpu, found.wall, found.parts) == (9.0, 18.0, {"tokenizer": 3.0, "model": 6.0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_a_lane_of_graphs_without_a_replay_fails(monkeypatch):
    monkeypatch.setattr(fastbert, "graphed", lambda model: model)
    case = dataclasses.replace(cases.INFERENCE_1.tiny(), lanes=(cases.GRAPHED,))
    (record,) = measure(case, 1.0, 1, False, "cpu")
    assert (record.status, record.reason) == ("failed", "no graph was replayed: it has no graphs")


def test_rows_fill_five_eighths():
    lengths = cases.quarter_to_whole(32, 128)
    assert min(lengths.sizes) == 32 and max(lengths.sizes) == 128 and 0.61 < lengths.fill_of(32, 128, 1.0) < 0.63
    assert cases.quarter_to_whole(1, 16).sizes == (4,)


def test_what_a_pretended_gpu_reads_as_zeros_is_stood_in_for():
    mask, read = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    module = SimpleNamespace(position_ids=torch.zeros(1, 8, dtype=torch.int64))
    before = packing_plan.count, mlm_heads.count, embeddings._position_reason
    assert embeddings._position_reason(module) is not None
    with true_reads([3, 5], [1, 2]):
        assert packing_plan.count(mask, read, None) == (counts.Capacity(8, 5), counts.Capacity(3, 2), False)
        assert mlm_heads.count(None, read, None) == (None, counts.Capacity(3, 2), False)
        assert embeddings._position_reason(module) is None
    assert (packing_plan.count, mlm_heads.count, embeddings._position_reason) == before


def test_a_read_that_moved_is_one_clear_line(monkeypatch):
    monkeypatch.delattr(mlm_heads, "count")
    with (
        pytest.raises(RuntimeError, match=r"fastbert\.layers\.mlm_heads\.count: no such function") as error,
        true_reads([], []),
    ):
        pass
    assert "\n" not in str(error.value)


def test_whether_stock_needs_a_mask_is_stood_in_for():
    """Zeros say that a mask hides something, ones that it hides nothing: the true lengths decide."""
    zeros, ones = torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    for tokens, needless in (([8, 8], True), ([8, 5], False)):
        with true_reads(tokens, [1, 1]):
            assert [masking_utils._ignore_bidirectional_mask_sdpa(mask, 8, None) for mask in (zeros, ones)] == [needless] * 2
            assert masking_utils._ignore_bidirectional_mask_sdpa(None, 8, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is no GPU is not a pretended one either")
def test_without_a_gpu_none_is_pretended():
    assert pretended.pretended() is None


@pytest.mark.gpu
def test_on_a_gpu():
    """Two lanes of the smallest case: times, the profiler's names, memory."""
    records = by_lane(run([cases.INFERENCE_1.name], seconds=0.4, rounds=2))
    ours, stock = records[PADDED], records[STOCK]
    assert ours.status == stock.status == "ok", (ours.reason, stock.reason)
    assert ours.seconds.low > 0 and ours.wall.low > 0 and ours.peak_bytes > 2 * 100e6
    assert list(ours.parts) == [FORWARD] and ours.parts[FORWARD] == pytest.approx(ours.runs, rel=0.05)
    assert ours.launches["Triton"] and not stock.launches["Triton"]
    assert ours.launches["libraries"] and stock.launches["libraries"] and stock.launches["ATen"]
    assert kernels(stock.launches) > 100
