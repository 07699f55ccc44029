"""Autocast: the same numbers and dtypes as in eager."""

import copy

import pytest
import torch
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.layers.masks import KernelMask
from fastbert.testing.models import (
    KERNELS,
    assert_bitwise,
    assert_equal,
    assert_no_fallback,
    counting,
    doubled,
    expected_launches,
    run,
)
from fastbert.testing.rows import DEVICE
from tests.models.tiny import KINDS, MLM, make, make_batch


def autocast(dtype=torch.float16):
    return torch.autocast(DEVICE.type, dtype)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equal_in_dtype_and_number(kind):
    model, batch = make(kind).train(), make_batch(kind) | {"output_hidden_states": True}
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch, within=autocast())
    assert launched == expected_launches(model)
    assert_no_fallback(patched, but=["BertEncoder"])  # hidden states are requested
    assert any(tensor.dtype == torch.float16 for tensor in results.values()), "autocast was off"
    eager = run(copy.deepcopy(model), batch, within=autocast())
    assert_equal(results, eager, run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_models_that_are_not_float32(dtype):
    model, batch = make(dtype=dtype), make_batch() | {"output_hidden_states": True}
    eager = run(copy.deepcopy(model), batch, within=autocast())
    exact = run(copy.deepcopy(model).double(), doubled(batch))
    with counting() as launched:
        results = run(fastbert.patch(model), batch, within=autocast())
    assert launched == expected_launches(model)
    assert_equal(results, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_module_returns_the_dtype_of_eager(dtype):
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output  # attention also returns its weights, or None
            seen.setdefault(name, []).append(tensor.dtype)

        return hook

    model = make(dtype=dtype, attention="sdpa")  # a hook on eager attention may read its weights
    for name, module in model.named_modules():
        if isinstance(module, (*KERNELS, bert.BertEmbeddings, bert.BertLMPredictionHead)):
            module.register_forward_hook(keep(name))
    run(model, make_batch(), within=autocast())
    with counting() as launched:
        run(fastbert.patch(model), make_batch(), within=autocast())
    assert launched == expected_launches(model)
    assert len(seen) == 11 and all(stock == patched for stock, patched in seen.values()), seen


def test_autocast_switched_off_inside():
    model, batch = fastbert.patch(make()), make_batch()
    plain = run(model, batch, backward=False)
    with autocast(), torch.autocast(DEVICE.type, enabled=False):
        assert_bitwise(run(model, batch, backward=False), plain)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="bfloat16 runs on the kernels where there is a GPU")
def test_bfloat16_stays_stock_in_the_interpreter():
    model, batch = make(), make_batch()
    stock = run(copy.deepcopy(model), batch, within=autocast(torch.bfloat16))
    with counting() as launched:
        results = run(fastbert.patch(model), batch, within=autocast(torch.bfloat16))
    assert not launched
    assert_bitwise(results, stock)
    reasons = {reason for row in fastbert.report(model).rows for reason in row.fallback_calls}
    assert reasons == {"bfloat16 is wrong in Triton's interpreter"}


def test_gradient_scaler_steps_alike():
    """fp16 autocast in training: a scaled loss, unscaled gradients, a skipped step at overflow."""

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
        for step in range(4):
            loss = run_loss(model, step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scaler.get_scale(), loss.item()

    def run_loss(model, step):
        with autocast():
            return model(**make_batch(MLM, seed=step)).loss

    stock_scale, stock_loss = train(make())
    with counting() as launched:
        scale, loss = train(fastbert.patch(make()))
    assert launched == expected_launches(make(), forward=4, backward=4)
    assert scale == stock_scale < 2.0**24, "the first scale has to overflow"
    assert loss == pytest.approx(stock_loss, rel=2e-3)


def test_nothing_of_the_last_layer_is_kept_for_a_next(monkeypatch):
    """Under autocast, what the last layer passes on would live as long as the mask."""
    made, init = [], KernelMask.__init__

    def noted(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(KernelMask, "__init__", noted)
    model = fastbert.patch(make().eval())
    with torch.no_grad(), autocast():
        model(**make_batch())
    assert made and all(mask.twins.low is None for mask in made)
