"""The loss of an evaluation against the model's own loss of all rows at once, on plain tensors."""

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from bench.train.encode import IGNORED
from bench.train.evaluation import loss_of, with_loss
from bench.train.tasks import TASKS

ROWS, LENGTH, CLASSES = 7, 5, 4


def mean(logits, labels):
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)


def predicted(task):
    """Random logits and labels of seven rows, and the loss that the head of the task computes from them."""
    torch.manual_seed(len(task))
    logits, labels = torch.randn(ROWS, LENGTH, CLASSES), torch.randint(CLASSES, [ROWS, LENGTH])
    labels[torch.rand(ROWS, LENGTH) < 0.6] = IGNORED
    classes = torch.randint(2, [ROWS])
    if task in ("ner", "mlm"):
        return logits, labels, mean(logits, labels)
    if task == "clm":
        return logits, labels, mean(logits[:, :-1], labels[:, 1:])
    if task == "pretraining":
        both = (logits, logits[:, 0, :2]), (labels, classes)
        return *both, mean(logits, labels) + mean(logits[:, 0, :2], classes)
    if task == "qa":
        ends = logits[:, :, 0], logits[:, :, 1]
        return ends, (classes, classes + 2), (mean(ends[0], classes) + mean(ends[1], classes + 2)) / 2
    return logits[:, 0], classes, mean(logits[:, 0], classes)


def rows(value, start, end):
    return tuple(own[start:end] for own in value) if isinstance(value, tuple) else value[start:end]


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 1, 5)])
@pytest.mark.parametrize("task", TASKS)
def test_any_batches_give_the_loss_of_all_rows(task, sizes):
    logits, labels, expected = predicted(task)
    reduce, compute = with_loss(task, TASKS[task].reduce, lambda prediction: {"kept": len(prediction.label_ids)})
    sums, start = [], 0
    for size in sizes:
        found, own = reduce(rows(logits, start, start + size), rows(labels, start, start + size))
        sums.append(own.numpy())
        start += size
    metrics = compute(EvalPrediction((found, numpy.concatenate(sums)), numpy.zeros(3)))
    assert metrics == {"kept": 3, "loss": pytest.approx(expected.item(), rel=1e-6)}


def test_without_a_label_there_is_no_loss():
    assert numpy.isnan(loss_of(numpy.array([[[1.0, 1.0], [0.0, 0.0]]])))
