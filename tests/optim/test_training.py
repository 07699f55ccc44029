"""Training as users do: patched and on fastbert.AdamW, against stock on torch.optim.AdamW. Every loss within 1e-5."""

import pytest
import torch
from transformers import get_scheduler

import fastbert
from tests.models.running import counting
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make, make_batch

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
WITH_LOSS = [kind for kind in KINDS if kind is not BASE]


def train(model, kind, optimizer_class, steps):
    """A new batch each step, warm-up and decay, gradients clipped as everybody does."""
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


def assert_same_training(kind, steps):
    stock, model = make(kind, **SMALL), fastbert.patch(make(kind, **SMALL))
    losses = train(stock, kind, torch.optim.AdamW, steps)
    with counting() as launched:
        torch.testing.assert_close(train(model, kind, fastbert.AdamW, steps), losses, rtol=0.0, atol=1e-5)
    assert launched["adamw_kernel"] == steps
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is noise, which AdamW scales up to a whole step
            torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=0.0, atol=1e-5, msg=name)


def test_fifteen_steps():
    assert_same_training(CLASSIFICATION, 15)


@pytest.mark.long
@pytest.mark.timeout(1800)  # the interpreter takes a second a step
@pytest.mark.parametrize("kind", WITH_LOSS, ids=str)
def test_two_hundred_steps(kind):
    assert_same_training(kind, 200)
