"""A whole training step, counted to the last launch: what a layer takes, and what everything around the layers takes.

On a fast GPU the host decides how long a step lasts, so a number here may only become smaller.
"""

from collections import Counter

import pytest
import torch

import fastbert
from fastbert.kernels import embedding_layernorm
from tests.models.test_launches_outside_layers import interpreter_unseen, launching
from tests.models.tiny import CLASSIFICATION, DEVICE, MLM, make, make_batch

__all__ = ["interpreter_unseen"]
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counted once, without a GPU")
DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def step(kind, layers, keywords, within=None):
    """What the second step of such a model launches, forward and backward."""
    model = fastbert.patch(make(kind, num_hidden_layers=layers, attention="sdpa", **DROPPED).train(), **keywords)
    batch = make_batch(kind)
    if "labels" in batch and batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(2):
        model.zero_grad()
        with launching() as found:
            if within:
                with within():
                    loss = model(**batch).loss
            else:
                loss = model(**batch).loss
            loss.backward()
    return found
