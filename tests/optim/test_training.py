"""Realistic training: patched with fastbert.AdamW against stock with torch.optim.AdamW, every loss within 1e-5."""

import pytest
import torch
from transformers import get_scheduler

import fastbert
from fastbert.testing.models import counting
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make, make_batch

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
WITH_LOSS = [kind for kind in KINDS if kind is not BASE]


def train(model, kind, optimizer_class, steps):
    """Train with a new batch per step, warm-up, decay and clipped gradients."""
    model.train()
    optimizer = optimizer_class(fastbert.param_groups(model, 1e-3))
    schedule = get_scheduler("linear", optimizer, steps // 10 + 1, steps)
    losses = []
    for step in range(steps):
        loss = model(**make_batch(kind, seed=step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def without_gradient(kind):
    """Parameters that add the same number to all inputs of a softmax: a key's bias, a bias shared by choices or positions.

    Their gradient is zero except for rounding. AdamW divides that noise by its own magnitude and takes full random steps, in
    stock too; no output depends on it.
    """
    model = make(kind, torch.float64, **SMALL)
    model(**make_batch(kind)).loss.backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    return {name for name, size in sizes.items() if size < 1e-12 * max(sizes.values())}


def assert_same_training(kind, steps):
    stock, model = make(kind, **SMALL), fastbert.patch(make(kind, **SMALL))
    losses = train(stock, kind, torch.optim.AdamW, steps)
    with counting() as launched:
        torch.testing.assert_close(train(model, kind, fastbert.AdamW, steps), losses, rtol=0.0, atol=1e-5)
    assert launched["adamw_kernel"] == steps
    idle = without_gradient(kind)
    assert 1 <= len(idle) <= 4 and any(name.endswith("key.bias") for name in idle), idle
    for name, parameter in model.named_parameters():
        if name not in idle:
            torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=0.0, atol=1e-5, msg=name)


def test_fifteen_steps():
    assert_same_training(CLASSIFICATION, 15)


@pytest.mark.long
@pytest.mark.timeout(1800)  # a step takes a second in the interpreter
@pytest.mark.parametrize("kind", WITH_LOSS, ids=str)
def test_two_hundred_steps(kind):
    assert_same_training(kind, 200)
