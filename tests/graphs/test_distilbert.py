"""Graphs of DistilBERT, whose masks pass through its forward."""

import copy

import pytest
import torch

import fastbert
from fastbert.testing.rows import DEVICE
from tests.graphs.stepping import DRIFT, adamw, ordinary
from tests.graphs.support import close, infer, row_of
from tests.models.test_distilbert import make, make_batch

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs"),
    pytest.mark.usefixtures("recorders"),
]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("head", ["base", "classification", "mlm"])
def test_a_replay_gives_what_the_ordinary_call_gives(head, padded):
    model = fastbert.graphed(fastbert.patch(make(head)))
    batch = {name: tensor for name, tensor in make_batch(head, padded).items() if name in ("input_ids", "attention_mask")}
    for inputs in (batch, batch | {"input_ids": batch["input_ids"].flip(1)}):
        close(infer(model, inputs), model(**inputs))
    assert row_of(model).kernel_calls == 2


@pytest.mark.parametrize(
    ("head", "switches"), [("classification", {}), ("mlm", {"mlm_logits": "none"})], ids=["read first", "mlm"]
)
def test_a_training_step(head, switches):
    models = [fastbert.patch(copy.deepcopy(make(head)).train(), **switches) for _ in range(2)]
    step, optimizer = fastbert.graphed_step(models[0], adamw(models[0])), adamw(models[1])
    batch = make_batch(head)
    for turn in range(6):
        inputs = batch | {"input_ids": batch["input_ids"].roll(turn, 1)}
        torch.testing.assert_close(step(**inputs), ordinary(models[1], optimizer, inputs), **DRIFT)
    assert step.report().replayed >= 3, str(step)
