"""The lanes that replay graphs: absent without the functions, and what their gate finds. The functions are stood in for."""

import itertools

import pytest
import torch

import fastbert
from bench.models import gate, graphs, workloads
from bench.models.run import run
from bench.models.workloads import GRAPHED, GRAPHED_STEP, LANES, Workload
from fastbert.graphs import capture

INFER = workloads.tiny(Workload("tiny", "classification", "infer", 4, 16, 1.0))
PADDED = workloads.tiny(Workload("tiny", "classification", "infer", 4, 16, 0.5))
TRAIN = workloads.tiny(Workload("tiny", "classification", "train", 4, 16, 0.5))
MLM = workloads.tiny(Workload("tiny", "mlm", "train", 4, 16, 0.5))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")


class Recorder:
    """Captures a call by keeping the function."""

    def __init__(self, device):
        pass

    def capture(self, function):
        class Graph:
            def replay(self):
                function()

        return Graph(), function()


def stand_in(monkeypatch, graphed=None, graphed_step=None):
    monkeypatch.setitem(capture.RECORDERS, "cpu", Recorder)
    monkeypatch.setattr(fastbert, "graphed", graphed, raising=False)
    monkeypatch.setattr(fastbert, "graphed_step", graphed_step, raising=False)


def replaying(model, change=lambda call, output: output):
    """What `fastbert.graphed` does, but for speed: `change` may spoil the output of a call."""
    graph, _ = capture.recorder_of(torch.device("cpu")).capture(lambda: None)
    forward, calls = model.forward, itertools.count()

    def call(**batch):
        if next(calls):
            graph.replay()
        return change(forward, forward(**batch))

    model.forward = call
    return model


def stepping(model, optimizer, before=lambda i, batch: batch, **budgets):
    graph, _ = capture.recorder_of(torch.device("cpu")).capture(lambda: None)
    calls = itertools.count()

    def step(**batch):
        i = next(calls)
        if i:
            graph.replay()
        optimizer.zero_grad()
        loss = model(**before(i, batch)).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    step.budgets = budgets
    return step


def status(workload, lane):
    *_, record = run(workload, lane)
    return record.status, record.reason


@pytest.mark.parametrize(("workload", "lane"), [(INFER, GRAPHED), (MLM, GRAPHED_STEP)])
def test_lanes_are_absent_where_fastbert_has_no_graphs(workload, lane, monkeypatch):
    stand_in(monkeypatch)
    found, reason = status(workload, lane)
    assert found == "absent" and "has no graphed" in reason


@pytest.mark.parametrize("workload", [INFER, PADDED], ids=["full", "padded"])
def test_a_graphed_forward_passes(workload, monkeypatch):
    stand_in(monkeypatch, replaying)
    assert status(workload, GRAPHED) == ("dry-run", None)


@pytest.mark.parametrize("workload", [TRAIN, MLM], ids=["classification", "mlm"])
def test_a_graphed_step_passes(workload, monkeypatch):
    stand_in(monkeypatch, graphed_step=stepping)
    *_, record = run(workload, GRAPHED_STEP)
    assert (record.status, record.reason) == ("dry-run", None) and len(record.losses) == 1


def test_a_graph_that_nobody_replays_fails(monkeypatch):
    stand_in(monkeypatch, lambda model: model)
    assert status(INFER, GRAPHED) == ("failed", gate.NOT_REPLAYED)


def test_a_stale_output_fails(monkeypatch):
    outputs = []

    def stale(call, output):
        outputs.append(output)
        return outputs[max(len(outputs) - 2, 0)]

    stand_in(monkeypatch, lambda model: replaying(model, stale))
    found, reason = status(INFER, GRAPHED)
    assert found == "failed" and "differ from eager: logits" in reason


def test_a_step_on_stale_inputs_fails(monkeypatch):
    kept = {}

    def stale(i, batch):
        return kept.setdefault(0, batch)

    stand_in(monkeypatch, graphed_step=lambda *given, **budgets: stepping(*given, before=stale, **budgets))
    found, reason = status(TRAIN, GRAPHED_STEP)
    assert found == "failed" and "differ from eager" in reason


def test_the_checked_batch_has_other_lengths_than_the_captured_ones():
    config = TRAIN.config()
    (checked,) = gate._checked(TRAIN, config, LANES[GRAPHED_STEP], "cpu")
    seen = [sorted(batch["attention_mask"].sum(1).tolist()) for batch in gate.captured(TRAIN, config, "cpu")]
    mine = sorted(checked["attention_mask"].sum(1).tolist())
    assert mine not in seen and {sum(lengths) for lengths in seen} == {sum(mine)}
    shapes = [batch["input_ids"].shape[1] for batch in gate._checked(INFER, config, LANES[GRAPHED], "cpu")]
    assert shapes == [16, 14]


def test_budgets_cover_every_batch():
    mask = torch.ones(2, 200, dtype=torch.int64)
    labels = torch.full((2, 200), -100)
    labels[0, :7] = 1
    batch = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    assert graphs.budgets([batch, batch]) == {"token_budget": 512, "read_budget": 256}
    assert graphs.budgets([{"input_ids": mask, "labels": torch.zeros(2)}]) == {}


def test_each_graph_lane_is_of_its_own_mode():
    assert LANES[GRAPHED].suits(INFER) and not LANES[GRAPHED].suits(TRAIN)
    assert LANES[GRAPHED_STEP].suits(TRAIN) and not LANES[GRAPHED_STEP].suits(INFER)
