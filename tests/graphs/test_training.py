"""Graphed training steps equal ordinary ones, on the CPU with a stand-in that records operations and runs them again."""

import copy

import pytest
import torch

import fastbert
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE
from tests.models.tiny import CLASSIFICATION, CLM, KINDS, MLM, make, make_batch

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu_training.py has graphs")

KIND = {kind.name: kind for kind in KINDS}
PRETRAINING, TOKENS, REGRESSION = KIND["pretraining"], KIND["token-classification"], KIND["regression"]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LR = 1e-2


@pytest.fixture(autouse=True)
def tapes():
    with recording_graphs() as recorders:
        yield recorders


def models(kind=CLASSIFICATION, **patch):
    """Two equal patched models in training mode."""
    model = make(kind, **SMALL).train()
    return fastbert.patch(copy.deepcopy(model), **patch), fastbert.patch(model, **patch)


def adamw(model, **options):
    return fastbert.AdamW(model.parameters(), lr=LR, **options)


def ordinary(model, optimizer, batch, max_grad_norm=None, scaler=None, scheduler=None):
    """The step as a user writes it."""
    loss = model(**batch).loss
    (loss if scaler is None else scaler.scale(loss)).backward()
    if max_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if scheduler is not None:
        scheduler.step()
    optimizer.zero_grad()
    return loss.detach()


def assert_same(ours, theirs):
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def batches(kind, number=7, **options):
    found = [make_batch(kind, seed=seed, **options) for seed in range(number)]
    for batch in found:
        if batch["labels"].shape == batch["attention_mask"].shape:
            batch["labels"][batch["attention_mask"] == 0] = -100
    return found


def check(kind, ours, theirs, number=7, replayed=4, **options):
    """Train both by the same batches; the losses and parameters are equal."""
    step = fastbert.graphed_step(ours, adamw(ours), **options)
    optimizer = adamw(theirs)
    for batch in batches(kind, number):
        loss = step(**batch)
        torch.testing.assert_close(loss, ordinary(theirs, optimizer, batch), rtol=1e-4, atol=1e-5)
    assert_same(ours, theirs)
    assert step.report().replayed == replayed, str(step)
    return step


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        (CLASSIFICATION, {}),
        (CLASSIFICATION, {"unpad": False}),
        (REGRESSION, {}),
        (TOKENS, {}),
        (TOKENS, {"unpad": True}),
        (MLM, {}),
        (MLM, {"mlm_logits": "none"}),
        (MLM, {"unpad": True}),
        (MLM, {"unpad": True, "mlm_logits": "none"}),
        (CLM, {"mlm_logits": "none"}),
        (PRETRAINING, {"mlm_logits": "none"}),
    ],
    ids=str,
)
def test_steps_equal_ordinary_ones(kind, patch):
    check(kind, *models(kind, **patch))
