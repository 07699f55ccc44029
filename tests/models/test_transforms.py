"""Transforms of a forward: torch.func, forward-mode derivatives, traces, tensor subclasses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import fastbert
from fastbert.testing.models import assert_bitwise, counting, expected_launches, run
from tests.models.tiny import BASE, CLASSIFICATION, MLM, make, make_batch


def reasons(model):
    return {reason for row in fastbert.report(model).rows for reason in row.fallback_calls}


def assert_is_stocks(compute, model, reason):
    """Check that `compute(model)` is bitwise stock's after patching, without a kernel and with this reason."""
    stock = compute(model)
    with counting() as launched:
        assert_bitwise(compute(fastbert.patch(model)), stock)
    assert not launched
    assert reasons(model) == {reason}


def test_functional_call_uses_the_kernels_with_the_parameters_it_is_given():
    model, other = fastbert.patch(make(seed=1)), fastbert.patch(make(seed=2))
    batch = make_batch()
    parameters = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with counting() as launched:
        loss = torch.func.functional_call(model, parameters, (), batch).loss
        loss.backward()
    assert launched == expected_launches(make())
    assert torch.equal(loss, other(**batch).loss)
    assert model.bert.encoder.layer[0].output.dense.weight.grad is None
    assert other.bert.encoder.layer[0].output.dense.weight.grad is not None


def test_func_grad_is_stocks():
    model, batch = make(), make_batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def gradients(model):
        def loss(parameters):
            return torch.func.functional_call(model, parameters, (), batch).loss

        return torch.func.grad(loss)(parameters)

    assert_is_stocks(gradients, model, "torch.func transforms use stock code")


def test_vmap_is_stocks():
    # One model on a batch of batches, and an ensemble of models on one batch.
    model, batch = make(CLASSIFICATION), make_batch(CLASSIFICATION, "none", labels=False)
    models = [make(CLASSIFICATION, seed=seed) for seed in (1, 2)]

    def both(model, models):
        ids = torch.stack([batch["input_ids"], batch["input_ids"].flip(1)])
        many = torch.func.vmap(lambda ids: model(ids).logits, randomness="error")(ids)
        parameters, buffers = torch.func.stack_module_state(models)

        def one(parameters, buffers):
            return torch.func.functional_call(models[0], (parameters, buffers), (batch["input_ids"],)).logits

        return {"many": many, "ensemble": torch.func.vmap(one)(parameters, buffers)}

    with torch.no_grad():
        stock = both(model, models)
        with counting() as launched:
            assert_bitwise(both(fastbert.patch(model), [fastbert.patch(m) for m in models]), stock)
    assert not launched


def test_forward_mode_derivative_is_stocks():
    model = make(BASE)
    embeddings = model.get_input_embeddings()(make_batch(BASE)["input_ids"]).detach()
    tangent = torch.randn_like(embeddings)

    def derivative(model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeddings, tangent)
            output = model(inputs_embeds=dual).last_hidden_state
            return {"tangent": forward_ad.unpack_dual(output).tangent}

    assert_is_stocks(derivative, model, "the kernels have no forward-mode derivative")


def test_jacobian_by_reverse_mode_is_right():
    # torch.autograd.functional runs plain backwards, so the kernels run.
    output = make().double().bert.encoder.layer[0].output.requires_grad_(False)
    x = torch.randn(2, 56, dtype=torch.float64, device=output.dense.weight.device)
    residual = torch.randn(2, 40, dtype=torch.float64, device=x.device)
    stock = torch.autograd.functional.jacobian(output, (x, residual))
    with counting() as launched:
        patched = torch.autograd.functional.jacobian(_patched_output(output), (x, residual))
    assert launched["dropout_add_layernorm_bwd_kernel"] == 2 * 40
    torch.testing.assert_close(patched, stock)


def _patched_output(output):
    holder = nn.ModuleDict({"output": copy.deepcopy(output)})
    return fastbert.patch(holder)["output"]


def test_jit_trace_is_stocks():
    model = make(CLASSIFICATION)
    batch = make_batch(CLASSIFICATION, labels=False)
    inputs = (batch["input_ids"], batch["attention_mask"])
    stock = model(*inputs).logits
    fastbert.patch(model)
    with warnings.catch_warnings(), counting() as launched:
        warnings.simplefilter("ignore")  # torch.jit's own warnings, about deprecation and constants
        traced = torch.jit.trace(model, inputs, strict=False, check_trace=False)
    assert not launched
    assert reasons(model) == {"torch.jit cannot trace the kernels"}
    # A trace is a plain graph of torch's operations: it runs without fastbert.
    torch.testing.assert_close(traced(*inputs)["logits"], stock)
    assert "fastbert::" not in str(traced.inlined_graph)


class Wrapped(torch.Tensor):
    """A tensor subclass with its own __torch_function__."""


def test_a_tensor_subclass_goes_through_stock_code():
    model = make(BASE)
    embeddings = model.get_input_embeddings()(make_batch(BASE)["input_ids"]).detach().as_subclass(Wrapped)
    stock = run(model, {"inputs_embeds": embeddings}, backward=False)
    with counting() as launched:
        assert_bitwise(run(fastbert.patch(model), {"inputs_embeds": embeddings}, backward=False), stock)
    assert not launched
    assert reasons(model) == {"Wrapped is not a plain tensor"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_types_that_differ_outside_autocast_go_through_stock_code(dtype):
    """LayerNorms kept in float32 in a half-precision model: stock's mixed dtypes, or stock's error."""
    model, batch = make(MLM, dtype), make_batch(labels=False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()

    def outcome(model):
        try:
            return run(model, batch, backward=False)
        except RuntimeError as error:
            return str(error)

    stock = outcome(model)
    with counting() as launched:
        patched = outcome(fastbert.patch(model))
    assert "dropout_add_layernorm_fwd_kernel" not in launched
    if isinstance(stock, str):
        assert patched == stock
    else:
        assert patched.keys() == stock.keys()
        assert all(patched[name].dtype == stock[name].dtype for name in stock)
        assert "outside autocast" in " ".join(reasons(model))
