"""The lanes that replay graphs, and what their gate finds where a graph is stale, or is not replayed."""

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


def a_graph():
    """A graph that does nothing, for a stand-in that computes each call."""
    return capture.recorder_of(torch.device("cpu")).capture(lambda: None)[0]


def replaying(model, change=lambda call, output: output):
    """What `fastbert.graphed` does, but for speed: `change` may spoil the output of a call."""
    graph = a_graph()
    forward, calls = model.forward, itertools.count()

    def call(**batch):
        if next(calls):
            graph.replay()
        return change(forward, forward(**batch))

    model.forward = call
    return model


def stepping(model, optimizer, before=lambda i, batch: batch, **budgets):
    graph = a_graph()
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

    return step


def status(workload, lane):
    *_, record = run(workload, lane)
    return record.status, record.reason


@pytest.mark.parametrize(
    ("workload", "lane"),
    [(INFER, GRAPHED), (PADDED, GRAPHED), (TRAIN, GRAPHED_STEP), (MLM, GRAPHED_STEP)],
    ids=["full", "padded", "classification", "mlm"],
)
def test_a_lane_passes(workload, lane):
    """fastbert's own functions, with graphs that are recorded and run again on the CPU."""
    *_, record = run(workload, lane)
    assert (record.status, record.reason) == ("dry-run", None) and len(record.losses) == (workload.mode == "train")


def test_a_model_without_graphs_fails(monkeypatch):
    monkeypatch.setattr(fastbert, "graphed", lambda model: model)
    assert status(INFER, GRAPHED) == ("failed", f"{gate.NOT_REPLAYED}: it has no graphs")


def test_why_nothing_was_replayed_is_said(monkeypatch):
    graphed = fastbert.graphed
    monkeypatch.setattr(fastbert, "graphed", lambda model: graphed(model, buckets=[(1, 8)]))
    found, reason = status(INFER, GRAPHED)
    assert found == "failed" and f"{gate.NOT_REPLAYED}: no bucket for a batch of" in reason
    monkeypatch.setattr(
        gate, "batches_of", lambda *arguments: [{"input_ids": torch.zeros(1, 1), "attention_mask": torch.ones(1)}]
    )
    found, reason = status(TRAIN, GRAPHED_STEP)
    assert found == "failed" and "more tokens than the largest budget" in reason


def test_a_timed_model_that_replays_only_some_calls_fails(monkeypatch):
    """The check is made on a model of its own, so the replays of the timed one are counted as well."""
    graphed, made = fastbert.graphed, itertools.count()

    def first_without(model):
        return model if next(made) == 0 else graphed(model)

    monkeypatch.setattr(fastbert, "graphed", first_without)
    assert status(INFER, GRAPHED) == ("failed", "0 of 1 calls replayed a graph")


def test_a_stale_output_fails(monkeypatch):
    outputs = []

    def stale(call, output):
        outputs.append(output)
        return outputs[max(len(outputs) - 2, 0)]

    monkeypatch.setattr(fastbert, "graphed", lambda model: replaying(model, stale))
    found, reason = status(INFER, GRAPHED)
    assert found == "failed" and "differ from eager: logits" in reason


def test_stale_weights_fail(monkeypatch):
    """A graph of casts that were made of former weights."""

    def casting(model):
        former, forward = {}, model.forward

        def call(**batch):
            former.update(former or {name: p.detach().clone() for name, p in model.named_parameters()})
            with torch.no_grad():
                now = [p.clone() for p in model.parameters()]
                for name, p in model.named_parameters():
                    p.copy_(former[name])
                output = forward(**batch)
                for p, x in zip(model.parameters(), now, strict=True):
                    p.copy_(x)
            return output

        model.forward = call
        return replaying(model)

    monkeypatch.setattr(fastbert, "graphed", casting)
    found, reason = status(INFER, GRAPHED)
    assert found == "failed" and "differ from eager: logits" in reason


def test_a_step_on_stale_inputs_fails(monkeypatch):
    kept = {}

    def stale(i, batch):
        return kept.setdefault(0, batch)

    monkeypatch.setattr(fastbert, "graphed_step", lambda *given, **budgets: stepping(*given, before=stale, **budgets))
    found, reason = status(TRAIN, GRAPHED_STEP)
    assert found == "failed" and "differ from eager" in reason


def test_the_checked_batch_has_other_lengths_than_the_captured_ones():
    (checked,) = gate._checked(TRAIN, LANES[GRAPHED_STEP], "cpu")
    seen = [sorted(batch["attention_mask"].sum(1).tolist()) for batch in gate._captured(TRAIN, "cpu")]
    mine = sorted(checked["attention_mask"].sum(1).tolist())
    assert mine not in seen and {sum(lengths) for lengths in seen} == {sum(mine)}
    shapes = [batch["input_ids"].shape[1] for batch in gate._checked(INFER, LANES[GRAPHED], "cpu")]
    assert shapes == [16, 14]


def test_budgets_cover_every_batch():
    mask = torch.ones(2, 200, dtype=torch.int64)
    labels = torch.full((2, 200), -100)
    labels[0, :7] = 1
    batch = {"input_ids": mask, "attention_mask": mask, "labels": labels}
    assert graphs.budgets([batch, batch]) == {"token_budget": 400, "read_budget": 8}
    mask[0, 101:] = 0
    assert graphs.budgets([batch]) == {"token_budget": 320, "read_budget": 8}, "301, in steps of 512 / 16"
    assert graphs.budgets([{"input_ids": mask, "labels": torch.zeros(2)}]) == {}


def test_each_graph_lane_is_of_its_own_mode():
    assert LANES[GRAPHED].suits(INFER) and not LANES[GRAPHED].suits(TRAIN)
    assert LANES[GRAPHED_STEP].suits(TRAIN) and not LANES[GRAPHED_STEP].suits(INFER)
