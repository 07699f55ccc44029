"""Models, optimizers and steps for the tests of graphed training steps."""

import copy

import torch

import fastbert
from fastbert.testing.rows import DEVICE
from tests.models.tiny import CLASSIFICATION, make, make_batch

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
# With torch's eps of 1e-8 the optimizer would turn the rounding of gradients that are zero (a key's bias) into whole steps.
OPTIONS = {"lr": 1e-2, "eps": 1e-4}
# Two runs in float32 drift apart: graphed steps split rows among kernels otherwise (budgets, lengths), and the optimizer
# enlarges the roundings of small gradients. A step that was lost, repeated or stale moves parameters by lr.
DRIFT = {"rtol": 1e-4, "atol": 1e-5}


def models(kind=CLASSIFICATION, **patch):
    """Two equal patched models in training mode."""
    model = make(kind, **SMALL).train()
    return fastbert.patch(copy.deepcopy(model), **patch), fastbert.patch(model, **patch)


def adamw(model, **options):
    return fastbert.AdamW(model.parameters(), **OPTIONS | options)


def ordinary(model, optimizer, batch, max_grad_norm=None, scaler=None, autocast=None, factor=1.0):
    """The step as a user writes it, with `factor` times the model's loss."""
    with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
        loss = model(**batch).loss * factor
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
    optimizer.zero_grad()
    return loss.detach()


def stock(seed=0, number=2, **overrides):
    """Equal stock models: the quickest on a CPU."""
    model = make(CLASSIFICATION, seed=seed, **SMALL | overrides).train()
    return [copy.deepcopy(model) for _ in range(number)]


def fused(model, cls=torch.optim.AdamW, **options):
    return cls(model.parameters(), **OPTIONS | {"fused": True} | options)


def plain(number=7, length=9, first=0):
    return [make_batch(CLASSIFICATION, "none", seed=seed, length=length) for seed in range(first, first + number)]


def train(step, theirs, optimizer, batches, **options):
    """Train both by the same batches; losses and parameters are equal."""
    for batch in batches:
        loss = step(**batch)
        torch.testing.assert_close(loss, ordinary(theirs, optimizer, batch, **options), **DRIFT)
    assert_same(step._model, theirs)


def assert_same(ours, theirs):
    """Parameters that drifted by no more than a few of DRIFT."""
    for (name, param), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            param, other, rtol=DRIFT["rtol"], atol=2 * DRIFT["atol"], msg=lambda text, name=name: f"{name}: {text}"
        )


def batches(kind, number=7, **options):
    found = [make_batch(kind, seed=seed, **options) for seed in range(number)]
    for batch in found:
        if batch["labels"].shape == batch["attention_mask"].shape:
            batch["labels"][batch["attention_mask"] == 0] = -100
    return found
