"""Modules that are not plain torch modules are called, never bypassed: parametrised, quantised, wrapped, replaced."""

import copy
from types import MethodType

import pytest
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.testing.models import assert_equal, check, counting, doubled, expected_launches, run
from tests.models.test_hooks import LAYER, without_one, without_outputs
from tests.models.tiny import make, make_batch


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight / 2


class Quantized(nn.Linear):
    """A stand-in for a 4-bit layer: a Linear subclass with weights that only its own forward can read."""

    def forward(self, x):
        return F.linear(x, (self.weight.T * 3).T, self.bias)


class Adapted(nn.Module):
    """A stand-in for LoRA: a Linear with an adapter beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.adapter = base, nn.Linear(base.in_features, base.out_features, bias=False).to(base.weight)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Halved())
    return linear


def quantized(linear):
    linear.__class__ = Quantized
    return linear


def rebound(linear):
    # A method, so that a deep copy has one bound to the copy.
    linear.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, linear)
    return linear


def hooked_by_accelerate(linear):
    class AddOne(ModelHook):
        def post_forward(self, module, output):
            return output + 1

    return add_hook_to_module(linear, AddOne())


def without_bias(linear):
    linear.bias = None
    return linear


LINEARS = [
    parametrized,
    parametrizations.weight_norm,
    quantized,
    Adapted,
    rebound,
    hooked_by_accelerate,
    without_bias,
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", LINEARS, ids=lambda change: change.__name__)
def test_a_linear_that_is_not_plain_is_called(change, when):
    batch, changed = make_batch(), change_linears(make(), change)
    if when == "before":
        patched = fastbert.patch(copy.deepcopy(changed))
    else:
        patched = change_linears(fastbert.patch(make()), change)
    with counting() as launched:
        results = run(patched, batch)
    # The module's output includes its bias; activation, residual and LayerNorm still run on the kernels.
    assert launched == expected_launches(changed)
    if change is Adapted:  # its adapter is random
        changed = fastbert.unpatch(copy.deepcopy(patched))
    assert_equal(results, run(changed, batch), run(copy.deepcopy(changed).double(), doubled(batch)))


def change_linears(model, change):
    for module in list(model.modules()):
        if isinstance(module, (bert.BertOutput, bert.BertSelfOutput, bert.BertIntermediate)):
            module.dense = change(module.dense)
    return model


class OtherNorm(nn.LayerNorm):
    """A LayerNorm that overrides forward."""

    def forward(self, x):
        return 3 * super().forward(x)


def other_class(norm):
    norm.__class__ = OtherNorm
    return norm


NORMS = {
    "subclass": other_class,
    "no bias": lambda norm: nn.LayerNorm(norm.normalized_shape, bias=False),
    "no weight": lambda norm: nn.LayerNorm(norm.normalized_shape, elementwise_affine=False),
    "RMSNorm": lambda norm: nn.RMSNorm(norm.normalized_shape),
    "parametrized": parametrized,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("norm", NORMS)
def test_another_layer_norm_stays_stock(norm, when):
    batch, changed = make_batch(), change_norms(make(), NORMS[norm])
    if when == "before":
        patched = fastbert.patch(copy.deepcopy(changed))
    else:
        patched = change_norms(fastbert.patch(make()), NORMS[norm])
    with counting() as launched:
        results = run(patched, batch)
    assert launched == expected_launches(changed, without=["dropout_add_layernorm", "gelu_layernorm"])
    assert_equal(results, run(changed, batch), run(copy.deepcopy(changed).double(), doubled(batch)))
    reasons = {row.reason for row in fastbert.report(patched).rows if row.kernel in NORMED}
    assert len(reasons) == 1 and "LayerNorm" in reasons.pop()


NORMED = ("dropout_add_layernorm", "gelu_layernorm")


def change_norms(model, change):
    device = model.device
    for module in list(model.modules()):
        if isinstance(module, (bert.BertOutput, bert.BertSelfOutput, bert.BertPredictionHeadTransform)):
            module.LayerNorm = change(module.LayerNorm).to(device)
    return model


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.0), nn.Identity()], ids=repr)
def test_another_dropout_stays_stock(dropout):
    model = make()
    for layer in model.bert.encoder.layer:
        layer.output.dropout = dropout
    check(model, make_batch(), expected=without_outputs(model))


def test_a_forward_replaced_before_patching_is_kept():
    # accelerate's hooks keep the previous forward, which would remain the stock one under a new class.
    model = make()
    output = model.bert.encoder.layer[0].output
    add_hook_to_module(output, ModelHook())
    check(model, make_batch(), expected=without_one(model, "dropout_add_layernorm"))
    fastbert.patch(model)
    (row,) = [row for row in fastbert.report(model).rows if row.module == LAYER + "output"]
    assert row.state == "untouched" and "forward was replaced" in row.reason
    with pytest.raises(fastbert.UnsupportedModelError, match="forward was replaced"):
        fastbert.patch(model, strict=True)


def test_a_forward_wrapped_after_patching_still_uses_the_kernel():
    model = fastbert.patch(make())
    add_hook_to_module(model.bert.encoder.layer[0].output, ModelHook())
    with counting() as launched:
        run(fastbert.patch(model), make_batch())
    assert launched == expected_launches(model)


def test_a_module_replaced_after_patching_is_stock_until_the_next_patch():
    model = fastbert.patch(make())
    fresh = bert.BertOutput(model.config).to(model.device)
    model.bert.encoder.layer[0].output = fresh
    with counting() as launched:
        run(model, make_batch())
    assert launched == without_one(model, "dropout_add_layernorm")
    (row,) = [row for row in fastbert.report(model).rows if row.module == LAYER + "output"]
    assert (row.state, row.reason) == ("untouched", "not patched")
    with counting() as launched:
        run(fastbert.patch(model), make_batch())
    assert launched == expected_launches(model)
