"""The weighted losses of ranks against the loss of all rows at once, values and gradients, on plain tensors."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.train.encode import IGNORED
from bench.train.weighting import counted, parts, weighted

ROWS, LENGTH, CLASSES = 7, 5, 4
DIVISIONS = [([0, 1, 2], [3, 4, 5, 6]), ([6], [0, 1, 2, 3, 4, 5]), ([2], [0, 1], [3, 4, 5, 6])]
TASKS = ("classification", "multiple-choice", "ner", "mlm", "clm", "qa", "pretraining")


def of_tokens(logits, labels):
    return cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), ignore_index=IGNORED)


def model(task, weight, batch):
    """Loss and outputs as the heads of transformers make them; the logits are `weight` times the batch's own numbers."""
    logits = batch["numbers"] * weight
    if task in ("ner", "mlm"):
        return of_tokens(logits, batch["labels"]), {}
    if task == "clm":
        return of_tokens(logits[:, :-1], batch["labels"][:, 1:]), {}
    if task == "qa":
        ends = [(logits[..., i], batch[name].clamp(0, LENGTH)) for i, name in enumerate(("start_positions", "end_positions"))]
        losses = [cross_entropy(own, places, ignore_index=LENGTH) for own, places in ends]
        return sum(losses) / 2, {"start_logits": ends[0][0], "end_logits": ends[1][0]}
    if task == "pretraining":
        second = logits[:, 0, :2]
        loss = of_tokens(logits, batch["labels"]) + cross_entropy(second, batch["next_sentence_label"])
        return loss, {"seq_relationship_logits": second}
    return cross_entropy(logits[:, 0], batch["labels"]), {}


def batch_of(task, unlabelled):
    """Random rows; `unlabelled` rows have no token with a label, or positions outside the sequence."""
    torch.manual_seed(len(task))
    batch = {"input_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64), "numbers": torch.randn(ROWS, LENGTH, CLASSES)}
    if task == "qa":
        batch |= {name: torch.randint(LENGTH, [ROWS]) for name in ("start_positions", "end_positions")}
        batch["start_positions"][unlabelled] = 99
    elif task in ("ner", "mlm", "clm", "pretraining"):
        labels = torch.randint(CLASSES, [ROWS, LENGTH])
        labels[torch.rand(ROWS, LENGTH) < 0.6] = IGNORED
        labels[:, 1] = 2
        labels[unlabelled] = IGNORED
        labels[unlabelled, 0] = 1 if task == "clm" else IGNORED  # of no token before it
        batch |= {"labels": labels, "next_sentence_label": torch.randint(2, [ROWS])}
    else:
        batch["labels"] = torch.randint(CLASSES, [ROWS])
    return batch


def over_ranks(task, batch, division):
    """Mean of the ranks' losses and of their gradients, as DistributedDataParallel makes it."""
    divided = [{name: value[rows] for name, value in batch.items()} for rows in division]
    everyone = sum(counted(task, part) for part in divided)
    losses, gradients = [], []
    for part in divided:
        weight = torch.full([CLASSES], 1.5, requires_grad=True)
        loss, outputs = model(task, weight, part)
        own = weighted(parts(task, loss, outputs, part), counted(task, part), everyone, len(division))
        own.backward()
        losses.append(own.detach())
        gradients.append(weight.grad)
    return torch.stack(losses).mean(), torch.stack(gradients).mean(0)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("unlabelled", [[], [6], [0, 1, 2]])
@pytest.mark.parametrize("task", TASKS)
def test_the_mean_over_ranks_is_the_loss_of_all_rows(task, unlabelled, division):
    batch = batch_of(task, unlabelled)
    weight = torch.full([CLASSES], 1.5, requires_grad=True)
    loss, _ = model(task, weight, batch)
    loss.backward()
    found, gradient = over_ranks(task, batch, division)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradient, weight.grad)


def test_unweighted_ranks_differ():
    """Where ranks count differently, the plain mean of their losses is another number."""
    batch = batch_of("mlm", [0])
    losses = [model("mlm", 1.5, {name: value[rows] for name, value in batch.items()})[0] for rows in DIVISIONS[0]]
    assert (torch.stack(losses).mean() - model("mlm", 1.5, batch)[0]).abs() > 1e-3


@pytest.mark.parametrize("task", ["mlm", "pretraining", "qa"])
def test_without_any_label_the_loss_is_that_of_the_model(task):
    batch = batch_of(task, list(range(ROWS)))
    assert model(task, 1.0, batch)[0].isnan() and over_ranks(task, batch, DIVISIONS[0])[0].isnan()
