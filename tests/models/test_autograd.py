"""Modes of autograd: without gradients, backward twice, a second derivative, hooks on tensors."""

import copy

import pytest
import torch

import fastbert
from tests.models.running import assert_bitwise, assert_equal, check, doubled, gradients, run
from tests.models.tiny import BASE, MLM, make, make_batch


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    with mode():
        results = check(make(), make_batch(), backward=False)
    assert not results["logits"].requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode):
    model = fastbert.patch(make())
    with_gradients = run(model, make_batch(), backward=False)
    with mode():
        assert_bitwise(run(model, make_batch(), backward=False), with_gradients)


def backward_twice(model, batch, again):
    """Gradients of two backwards through one graph (`again`) or of two forwards, added up as autograd does."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward(retain_graph=again)
    loss = loss if again else model(**batch).loss
    loss.backward()
    return gradients(model.named_parameters())


@pytest.mark.parametrize("again", [True, False])
def test_two_backwards_add_up(again):
    model, batch = make(), make_batch()
    stock = backward_twice(copy.deepcopy(model), batch, again)
    exact = backward_twice(copy.deepcopy(model).double(), doubled(batch), again)
    assert_equal(backward_twice(fastbert.patch(model), batch, again), stock, exact)


def test_a_second_backward_without_retain_graph_raises_as_in_stock():
    loss = fastbert.patch(make())(**make_batch()).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def gradient_penalty(model):
    embeddings = model.get_input_embeddings()(make_batch()["input_ids"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings)[0].square().sum(), embeddings, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("kind", [BASE, MLM], ids=str)
def test_a_gradient_penalty_raises(kind):
    # The kernels have no second derivative. To return a number all the same would be to return a wrong one.
    gradient_penalty(make(kind))
    with pytest.raises(RuntimeError, match="(?i)differentia|derivative"):
        gradient_penalty(fastbert.patch(make(kind)))


def test_a_second_derivative_of_a_frozen_model_raises():
    # Without parameters in the way, the gradient of a plain sum is a constant to autograd in every layer.
    model = fastbert.patch(make(BASE)).requires_grad_(False)
    embeddings = model.get_input_embeddings()(make_batch()["input_ids"]).detach().requires_grad_()
    output = model(inputs_embeds=embeddings).last_hidden_state[..., 0].sum()
    (gradient,) = torch.autograd.grad(output, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)differentia|derivative"):
        (gradient * embeddings).sum().backward()


MODULES = {
    "bert.encoder.layer.0.output": (56, 40),
    "bert.encoder.layer.0.intermediate": (40,),
    "cls.predictions.transform": (40,),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_second_derivative_raises_where_the_upstream_gradient_is_constant(name):
    # The gradient of a plain sum does not itself require one, so autograd would take what the backward computes for
    # a constant, and with the input as a factor the penalty would be differentiated, wrongly, without a word.
    module = fastbert.patch(make()).get_submodule(name).requires_grad_(False)
    inputs = [torch.randn(3, width, requires_grad=True) for width in MODULES[name]]
    inputs = [x.to(next(module.parameters()).device).detach().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(module(*inputs).sum(), inputs, create_graph=True)
    penalty = sum((gradient * x).sum() for gradient, x in zip(gradients, inputs, strict=True))
    with pytest.raises(RuntimeError, match="(?i)differentia|derivative"):
        penalty.backward()


def test_a_gradient_with_create_graph_is_right_while_it_is_not_differentiated_again():
    model, batch = make(), make_batch()

    def first(model, batch):
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(model(**batch).loss, parameters, create_graph=True, allow_unused=True)
        return {f"gradient of {n}": g.detach() for n, g in zip(names, found, strict=True) if g is not None}

    stock = first(copy.deepcopy(model), batch)
    exact = first(copy.deepcopy(model).double(), doubled(batch))
    assert_equal(first(fastbert.patch(model), batch), stock, exact)


def test_gradients_of_some_parameters_only():
    model, batch = fastbert.patch(make()), make_batch()
    whole = run(model, batch)
    name = "bert.encoder.layer.0.output.LayerNorm.weight"
    (gradient,) = torch.autograd.grad(model(**batch).loss, model.get_parameter(name))
    assert torch.equal(gradient, whole[f"gradient of {name}"])


def test_a_hook_on_a_parameters_gradient_fires():
    model = fastbert.patch(make())
    bias = model.bert.encoder.layer[1].intermediate.dense.bias
    seen = []
    bias.register_hook(lambda gradient: seen.append(gradient.clone()))
    run(model, make_batch())
    assert len(seen) == 1 and torch.equal(seen[0], bias.grad)
