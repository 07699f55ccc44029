"""Operations of the matrix products, counted by torch: those needed for the tokens and the rows that are read."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastbert
from fastbert.testing.models import run
from tests.models.tiny import CLASSIFICATION, MLM, ROWS, VOCABULARY, make, make_batch

# Ops that torch's table lacks.
SAME_AS = {torch.ops.aten.addmm_: torch.ops.aten.addmm}


class Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its global module hooks, with which every module would fall back to stock."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        product = SAME_AS.get(function._overloadpacket, function._overloadpacket)
        if product in flop_registry:
            self.total += flop_registry[product](*args, **kwargs or {}, out_val=out)
        return out


def counted(model, batch):
    with Counter() as counter:
        run(model, batch)
    return counter.total


def layer(config, tokens, read=None):
    """Operations of a layer's forward without scores: projections for every token, the rest for the rows that are read."""
    read = tokens if read is None else read
    hidden, wide = config.hidden_size, config.intermediate_size
    return 2 * hidden * (tokens * 2 * hidden + read * 2 * hidden + read * 2 * wide)


def batch_of(kind):
    batch = make_batch(kind)
    if kind is MLM:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("unpad", [True, False])
def test_masked_language_model(unpad, mlm_logits):
    """A training step costs three forwards; logits without a gradient cost one."""
    batch = batch_of(MLM)
    model = fastbert.patch(make(MLM).train(), unpad=unpad, mlm_logits=mlm_logits)
    config, hidden = model.config, model.config.hidden_size
    every = batch["input_ids"].numel()
    tokens = int(batch["attention_mask"].sum()) if unpad else every
    labelled = int((batch["labels"] != -100).sum())
    read = labelled if unpad and mlm_logits == "none" else tokens
    transformed = labelled if mlm_logits == "none" else every
    once = layer(config, tokens) + layer(config, tokens, read) + 2 * transformed * hidden**2
    expected = 3 * (once + 2 * labelled * hidden * VOCABULARY)
    if mlm_logits == "full":
        expected += 2 * every * hidden * VOCABULARY
    assert counted(model, batch) == expected


def test_classification():
    """The last layer, the pooler and the classifier run for the first positions only."""
    batch, model = batch_of(CLASSIFICATION), fastbert.patch(make(CLASSIFICATION).train())
    config, hidden = model.config, model.config.hidden_size
    tokens = int(batch["attention_mask"].sum())
    once = layer(config, tokens) + layer(config, tokens, ROWS) + 2 * ROWS * hidden * (hidden + config.num_labels)
    assert counted(model, batch) == 3 * once


def test_the_counter_counts_stock_s_scores_too():
    """The counter sees every product: stock's attention has two more per layer."""
    batch, model = batch_of(CLASSIFICATION), make(CLASSIFICATION).train()
    config, hidden, every = model.config, model.config.hidden_size, batch["input_ids"].numel()
    scores = 2 * 2 * hidden * every * batch["input_ids"].shape[1]
    once = config.num_hidden_layers * (layer(config, every) + scores) + 2 * ROWS * hidden * (hidden + config.num_labels)
    assert counted(model, batch) == 3 * once
