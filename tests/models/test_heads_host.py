"""Host cost of the language-model heads: their exact kernel launches and ATen calls, by name."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.kernels import linear_cross_entropy as loss
from fastbert.kernels.core.launch import recording
from fastbert.kernels.linear_cross_entropy import chunked as linear_cross_entropy_chunks
from fastbert.layers import mlm_heads
from fastbert.layers.counts import Capacity
from fastbert.testing.rows import DEVICE

from .tiny import MLM, make

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counted once, without a GPU")

BATCH, SEQLEN, LABELS = 2, 8, 5
# ATen calls without work for a device.
VIEWS = {
    *("_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "select", "slice"),
    *("split", "t", "transpose", "unbind", "unsqueeze", "view"),
}


class Calls(TorchDispatchMode):
    """Counts ATen calls by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if func.namespace == "aten" and name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Given(nn.Module):
    """A stand-in for the encoder."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, **arguments):
        return SimpleNamespace(last_hidden_state=self.hidden, hidden_states=None, attentions=None)


def head_of(mlm_logits):
    model = fastbert.patch(make(MLM), mlm_logits=mlm_logits).train()
    model.bert = Given(torch.randn(BATCH, SEQLEN, model.config.hidden_size, requires_grad=True))
    return model


def batch():
    ids = torch.randint(5, 90, (BATCH, SEQLEN))
    labels = torch.full_like(ids, -100)
    labels.view(-1)[:LABELS] = 7
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def chunks(monkeypatch):
    """Launches are recorded and not run, so the counts that are read back are given: two chunks of labelled rows."""
    monkeypatch.setattr(mlm_heads, "count", lambda *masks: (None, Capacity(LABELS, LABELS), False))
    monkeypatch.setattr(loss, "check_on_cpu", lambda *arguments: None)
    monkeypatch.setattr(linear_cross_entropy_chunks, "rows_per_chunk", lambda *sizes: 3)
    monkeypatch.setattr(loss, "max_kept_rows", lambda *sizes: -1)


def counted(function):
    launched = Counter()

    def record(kernel, programs, config, arguments):
        launched[kernel.__name__] += 1
        if "read_index_ptr" in arguments:  # the attribute that torch reads
            arguments["read_index_ptr"].numpy()[:] = 0

    with recording("sm_90", record), Calls() as calls:
        result = function()
    return result, launched, calls.counts


FORWARD = {"gelu_layernorm_fwd_kernel": 1, "row_counts_kernel": 1, "packed_rows_kernel": 1, "gather_rows_kernel": 1}
LOSS = {"linear_cross_entropy_fwd_kernel": 2, "linear_cross_entropy_reduce_kernel": 1}
BACKWARD = {"gelu_layernorm_bwd_kernel": 1, "column_sums_kernel": 1, "gather_rows_kernel": 1}
SCALED = {"linear_cross_entropy_bwd_scale_kernel": 3}
# The positions with a label and their labels; the transform's product; the padded bias; for each chunk its logits,
# the gradients of rows and weight, the sum of its columns, and the sum of both.
COMPUTED = {"ne": 1, "index_select": 1, "mm": 3, "copy_": 1, "addmm": 4, "sum": 3}
LOGITS = {"addmm": 1}
PRODUCTS = {"mm": 2}  # of the transform's backward


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
def test_a_head_launches_no_more_than_it_must(mlm_logits, chunks):
    model, inputs = head_of(mlm_logits), batch()
    output, launched, computed = counted(lambda: model(**inputs))
    assert (output.logits is None) == (mlm_logits == "none")
    assert launched == FORWARD | LOSS
    assert computed == Counter(COMPUTED) + Counter(LOGITS if mlm_logits == "full" else {})
    _, launched, computed = counted(output.loss.backward)
    assert launched == BACKWARD | SCALED
    assert computed == Counter(PRODUCTS) + Counter({"ones_like": 1})


def test_autocast_casts_the_weight_once(chunks):
    model, inputs = head_of("full"), batch()
    with torch.autocast("cpu", torch.float16):
        output, _, computed = counted(lambda: model(**inputs))
    assert output.logits.dtype == torch.float16
    # Casts: hidden and weight of the transform's product, weight and bias of the decoder's. The CPU casts more, because it
    # has no product of 16-bit tensors with a float32 sum: both factors of each chunk.
    assert computed["_to_copy"] == 2 + 2 + 2 * 2


def test_an_argument_of_an_unknown_name():
    """Stock's forward may accept it; if not, stock raises the error."""
    from fastbert.layers.stock import stock_class

    class Strict(stock_class("BertForMaskedLM")):
        def forward(self, input_ids=None, labels=None):
            return input_ids

    forward = mlm_heads._fast_forward(Strict, None, lambda *_: True)
    model = head_of("none")
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        forward(model, input_ids=torch.zeros(1), label=1, labels=batch()["labels"])


def test_spare_capacity_has_no_label():
    """Spare capacity has no label even if the first row, to which its index is clamped, has one."""
    from fastbert.layers.packing import rows_of

    targets = batch()["labels"]
    labelled, hidden = targets != -100, torch.randn(BATCH, SEQLEN, 4)
    rows = rows_of(labelled, SEQLEN, LABELS + 2, exact=False)
    taken, labels = mlm_heads._labelled(torch.nn.Module(), hidden, targets, labelled, rows, -100)
    assert labels.tolist() == [7] * LABELS + [-100] * 2
    assert torch.equal(taken[:LABELS], hidden.view(-1, 4)[:LABELS]) and not taken[LABELS:].any()
