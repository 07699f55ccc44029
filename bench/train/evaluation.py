"""The loss of an evaluation, from the predictions of all ranks: the same for any division of the rows into batches.

Trainer averages the losses of batches, each a mean over its own labels, and ranks repeat rows to fill the last batch. Here
each row gives the sum of its losses and how many these are. Trainer gathers that from all ranks like any prediction, without
the repeated rows, and the loss is all sums over all counts, each part of a loss with two of them by itself.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from bench.train.metrics import Compute, Metrics, masked_likelihood

Reduce = Callable[[Any, Any], Any]


def with_loss(task: str, reduce: Reduce, compute: Compute) -> tuple[Reduce, Compute]:
    """A task's reduction of the logits and its metrics, both with the loss in addition."""

    def reduced(logits: Any, labels: Any) -> tuple[Any, Tensor]:
        found = reduce(logits, labels)
        return found, sums_of_rows(task, found, logits, labels)

    def computed(prediction: EvalPrediction) -> Metrics:
        found, sums = prediction.predictions
        return compute(EvalPrediction(found, prediction.label_ids)) | {"loss": loss_of(sums)}

    return reduced, computed


def sums_of_rows(task: str, found: Any, logits: Any, labels: Any) -> Tensor:
    """The sum of each row's losses and their number, for each part of the task's loss: float64 [rows, parts, 2].

    found: what the task's own reduction made of logits and labels, where it is such sums.
    """
    if task in ("mlm", "clm"):
        parts = [found]
    elif task == "pretraining":
        parts = [found[0], _once(logits[1], labels[1])]
    elif task == "ner":
        parts = [masked_likelihood(logits, labels)]
    elif task == "qa":
        parts = [_once(own, places, share=0.5) for own, places in zip(logits, labels, strict=True)]
    else:
        parts = [_once(logits, labels)]
    return torch.stack(parts, dim=1)


def loss_of(sums: numpy.ndarray) -> float:
    """The loss of all rows from their sums, [rows, parts, 2]; NaN if a part has nothing to count, as in the model."""
    return sum(total / count if count else math.nan for total, count in sums.sum(0).tolist())


def _once(logits: Tensor, labels: Tensor, share: float = 1.0) -> Tensor:
    """`share` of the loss of each row that has one label, and 1: float64 [rows, 2]."""
    losses = cross_entropy(logits.float(), labels, reduction="none").double() * share
    return torch.stack([losses, torch.ones_like(losses)], dim=1)
