"""Training: every loss and the final parameters stay within 1e-5 of the stock model's."""

import pytest
import torch

import fastbert
from fastbert.testing.models import counting, expected_launches
from tests.models.tiny import MLM, make, make_batch

SMALL = {"hidden_size": 16, "intermediate_size": 32}


def train(model, steps):
    """Train with AdamW on random tokens, with a new batch in each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(steps):
        batch = make_batch(MLM, seed=step)
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)  # as collators do
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_training(seed, steps, **keywords):
    stock, model = make(seed=seed, **SMALL), fastbert.patch(make(seed=seed, **SMALL), **keywords)
    losses = train(stock, steps)
    with counting() as launched:
        torch.testing.assert_close(train(model, steps), losses, rtol=0.0, atol=1e-5)
    assert launched == expected_launches(model, forward=steps, backward=steps)
    for name, parameter in model.named_parameters():
        # A key's bias adds the same number to all scores of a query, so its gradient is zero except for rounding. AdamW divides
        # that noise by its own magnitude and takes full random steps, in stock too; no output depends on it.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=0.0, atol=1e-5, msg=name)
    initial = make(seed=seed, **SMALL).state_dict()
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, initial[name])]
    assert len(moved) == len(initial), "a parameter was not trained"


PACKED = {"unpad": True, "mlm_logits": "none"}


@pytest.mark.parametrize("keywords", [{}, PACKED], ids=["defaults", "packed"])
def test_twelve_steps(keywords):
    assert_same_training(0, 12, **keywords)


@pytest.mark.long
@pytest.mark.parametrize("keywords", [{}, PACKED], ids=["defaults", "packed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_hundred_steps(seed, keywords):
    assert_same_training(seed, 200, **keywords)
