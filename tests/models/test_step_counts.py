"""Counts every launch and ATen call of a training step, per layer and around the layers.

On a fast GPU a step is host-bound, so a number here may only decrease, and a change of the layer changes these numbers
knowingly (those of the layer op alone are in tests/kernels/encoder_layer/test_counts.py). The ATen calls are those of a GPU,
except 16-bit products with 32-bit results, which are one call there and two here.
"""

from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch

import fastbert
from fastbert.kernels import embedding_layernorm
from fastbert.kernels.core import tensor_forms
from fastbert.kernels.encoder_layer import products
from tests.models.test_launches_outside_layers import interpreter_unseen, launching
from tests.models.tiny import CLASSIFICATION, DEVICE, MLM, make, make_batch

__all__ = ["interpreter_unseen"]  # a fixture
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counted once, without a GPU")

OF_THE_HOST = ("unsafe_split_with_sizes",)
LAYER = {
    **{"attention_fwd": 1, "dropout_add_layernorm_fwd": 2, "bias_gelu_fwd": 1},
    **{"attention_bwd_q": 1, "attention_bwd_kv": 1},
    **{"dropout_add_layernorm_bwd": 2, "bias_gelu_bwd": 1, "column_sums": 1},
    # Products: one for three projections, two that add the residual's gradient.
    **{"addmm": 1, "mm": 9, "addmm_": 2},
}
UNDER_AUTOCAST = LAYER | {"mm": 11, "addmm_": 0, "add_": 2, "_to_copy": 4}
# In 16 bits, one kernel computes the gradients of short sequences.
UNDER_AUTOCAST |= {"attention_bwd_q": 0, "attention_bwd_kv": 0, "attention_bwd_short": 1}

EMBEDDINGS = Counter({f"embedding_layernorm_bwd_{part}": 1 for part in ("order", "runs", "sums", "finish")})
EMBEDDINGS.update({"embedding_layernorm_fwd": 1, "embedding_layernorm_bwd": 1, "new_zeros": 1, "randint": 1})
STEP = EMBEDDINGS + Counter(randint=1, _to_copy=1, ones_like=1)  # all layers' seeds, the mask, the loss's own gradient
POOLED = Counter(
    # The first rows, pooler, dropout, classifier and loss, as in stock.
    **{"addmm": 2, "mm": 4, "sum": 2, "tanh": 1, "tanh_backward": 1, "select_backward": 1},
    **{"bernoulli_": 1, "div_": 1, "mul": 2},
    **{"_log_softmax": 1, "_log_softmax_backward_data": 1, "nll_loss_forward": 1, "nll_loss_backward": 1},
)
HEAD = Counter(
    **{"gelu_layernorm_fwd": 1, "gelu_layernorm_bwd": 1, "column_sums": 1},
    **{"linear_cross_entropy_fwd": 1, "linear_cross_entropy_reduce": 1, "linear_cross_entropy_bwd_scale": 3},
    # The labels' rows, and on the CPU a check of the labels' range.
    **{"ne": 2, "row_counts": 1, "packed_rows": 1, "index_select": 1},
    **{"ge": 1, "lt": 1, "bitwise_and": 1, "bitwise_or": 1, "index": 1},
    **{"mm": 4, "addmm": 2, "sum": 1, "copy_": 1},
)
PACKED = Counter(embedding_layernorm_ids=1)  # and not what they are embedded as
CASES = {
    "classification, padded": (CLASSIFICATION, {"unpad": False}, POOLED + Counter(key_bounds=1)),
    # Rows read and unpacked, forward and backward; the last layer has one more product, because its queries are other rows.
    "classification, packed": (
        CLASSIFICATION,
        {},
        POOLED + PACKED + Counter(row_counts=1, packed_rows=1, gather_rows=4, addmm=1, mm=2, add=1),
    ),
    # The logits' product, without gradient; the sum of the hidden states' two gradients.
    "mlm, logits": (MLM, {}, HEAD + Counter(key_bounds=1, gather_rows=2, addmm=1, add=1)),
    "mlm, none": (
        MLM,
        {"unpad": True, "mlm_logits": "none"},
        HEAD + PACKED + Counter(gather_rows=6, addmm=1, mm=2, add=2),
    ),
}
DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@pytest.fixture(autouse=True)
def looked_at_once(monkeypatch):
    """Exclude what a process does once, or only on the CPU."""
    monkeypatch.setattr(embedding_layernorm, "_check_range", lambda *_: None)
    monkeypatch.setattr(products, "adds_last", lambda a: True)
    tensor_forms._proven()


def step(kind, layers, keywords, within=nullcontext):
    """The launches of the second step of such a model."""
    model = fastbert.patch(make(kind, num_hidden_layers=layers, attention="sdpa", **DROPPED).train(), **keywords)
    batch = make_batch(kind)
    if kind is MLM:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(2):
        model.zero_grad()
        with launching() as found:
            with within():
                loss = model(**batch).loss
            loss.backward()
    return Counter({name: n for name, n in found.items() if name not in OF_THE_HOST})


@pytest.mark.parametrize("case", CASES)
def test_a_step(case):
    kind, keywords, rest = CASES[case]
    two, three = (step(kind, layers, keywords) for layers in (2, 3))
    assert three - two == LAYER and not two - three
    layers = Counter({name: 2 * n for name, n in LAYER.items()})
    assert two - layers == STEP + rest


def test_a_step_under_autocast():
    """Three more casts outside the layers for each weight and bias of pooler and classifier, and their gradients."""
    within = partial(torch.autocast, DEVICE.type, torch.float16)
    two, three = (step(CLASSIFICATION, layers, {"unpad": False}, within) for layers in (2, 3))
    assert three - two == +Counter(UNDER_AUTOCAST)
    layers = Counter({name: 2 * n for name, n in UNDER_AUTOCAST.items()})
    # And one for the embeddings' output, the input of the first layer.
    assert two - layers == STEP + CASES["classification, padded"][2] + Counter(_to_copy=13)
