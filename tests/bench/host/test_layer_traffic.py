"""A layer's launches and bytes, counted on tensors without memory: they do not grow unnoticed."""

import pytest
import torch

from bench.host.layer_traffic import SHAPES, of_layer
from fastbert.kernels.encoder_layer.forward import Inputs

pytestmark = pytest.mark.no_launch

LAUNCHES = 25
# In units of a [tokens, hidden] tensor, of what kernels move besides products; and of everything, in MB.
MOST_TENSORS, MOST_MB = 62, {(32, 128): 757, (16, 512): 1452}
PRODUCTS = ("mm", "addmm", "addmm_")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_layer_moves(shape):
    traffic = of_layer(*shape)
    launches, moved = traffic.total
    tensor = shape[0] * shape[1] * 768 * 2
    assert launches <= LAUNCHES and sum(traffic.launches[name] for name in PRODUCTS) == 12
    assert moved <= MOST_MB[shape] * 1e6
    assert 50 * tensor < moved - sum(traffic.moved[name] for name in PRODUCTS) <= MOST_TENSORS * tensor


def test_a_call_that_nobody_expects_counts(monkeypatch):
    """A copy of the rows that are read, as one that is made by mistake."""
    before = of_layer(2, 128)
    monkeypatch.setattr(Inputs, "masks", lambda self, made=Inputs.masks: (torch.clone(self.x), made(self))[1])
    after = of_layer(2, 128)
    assert after.launches["clone"] == 2 and after.total[1] - before.total[1] == 4 * 2 * 128 * 768 * 2


def test_what_is_given_twice_counts_twice():
    """GELU's backward writes over what it reads: 4 times dy, h, dh and the activation, of 4 tensors each."""
    traffic = of_layer(2, 128)
    tensor = 2 * 128 * 768 * 2
    assert traffic.moved["bias_gelu_bwd_kernel"] >= 16 * tensor
    assert traffic.moved["attention_fwd_kernel"] >= 4 * tensor
