"""Modes of autograd: without gradients, backward twice, a second derivative, hooks on tensors."""

import copy

import pytest
import torch

import fastbert
from fastbert.kernels.core import failures
from fastbert.testing.models import assert_bitwise, assert_equal, check, doubled, gradients, run
from tests.models.tiny import BASE, CLASSIFICATION, MLM, make, make_batch


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
    """Gradients of two backwards through one graph (`again`) or of two forwards, accumulated by autograd."""
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
    # The kernels have no second derivative, so any number they returned would be wrong.
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


def embedded(model):
    return model.get_input_embeddings()(make_batch()["input_ids"]).detach().requires_grad_()


def of_inputs(model, x):
    output = model(inputs_embeds=x).last_hidden_state.pow(3).sum()
    (gradient,) = torch.autograd.grad(output, x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)


def of_a_weight(model, x):
    (gradient,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state.pow(3).sum(), x, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), model.encoder.layer[0].output.dense.weight, allow_unused=True)


def of_a_weight_with_packing(model, x):
    weight = model.encoder.layer[1].attention.self.query.weight
    (gradient,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state.pow(3).sum(), weight, create_graph=True)
    torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)


def of_all(model, x):
    torch.autograd.functional.hvp(lambda x: model(inputs_embeds=x).last_hidden_state.pow(3).sum(), x.detach(), x.detach())


SECOND = [of_inputs, of_a_weight, of_a_weight_with_packing, of_all]


@pytest.mark.parametrize("by_module", [False, True], ids=["one op", "module by module"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("ask", SECOND, ids=lambda ask: ask.__name__)
def test_a_second_derivative_of_named_inputs_raises(ask, checkpointed, by_module):
    """Only the path to `inputs` runs then, and a missing gradient would silently be zero."""
    model = fastbert.patch(make(BASE))
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.encoder.layer if by_module else ():
        layer.register_forward_hook(lambda *_: None)
        layer.output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        ask(model, embedded(model))


def test_a_second_derivative_by_what_is_not_kept_raises():
    """Through LayerNorm's input and the loss's bias, which their backwards do not save."""
    model = fastbert.patch(make(BASE, num_hidden_layers=1, hidden_act="gelu_10"))
    output = model(**make_batch(BASE)).last_hidden_state
    dense = model.encoder.layer[0].output.dense
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), dense.weight, create_graph=True)
    for target in (dense.bias, model.embeddings.word_embeddings.weight):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.square().sum(), target, retain_graph=True, allow_unused=True)
    head = fastbert.patch(make(MLM))
    (gradient,) = torch.autograd.grad(head(**make_batch()).loss, head.bert.embeddings.word_embeddings.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), head.cls.predictions.bias, allow_unused=True)


@pytest.mark.parametrize("by_module", [False, True], ids=["one op", "module by module"])
def test_a_batch_of_gradients_raises_and_switches_nothing_off(by_module):
    model = fastbert.patch(make(BASE))
    if by_module:
        model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    x = embedded(model)
    output = model(inputs_embeds=x).last_hidden_state
    with pytest.raises(RuntimeError, match="one gradient at a time.*unpatch"):
        torch.autograd.grad(output, x, torch.randn(3, *output.shape).to(output), is_grads_batched=True)
    assert not failures.reasons


def spread(x):
    """A copy of x in other memory, in every third element."""
    if not x.dim():
        return x.clone()
    memory = torch.zeros(*x.shape, 3, dtype=x.dtype, device=x.device)
    memory[..., 1] = x.detach()
    return memory[..., 1]


@pytest.mark.parametrize("kind", [MLM, CLASSIFICATION], ids=str)
def test_saved_tensors_come_back_spread(kind):
    """Including integers, of packed rows and of labels."""
    model = fastbert.patch(make(kind))
    plain = run(model, make_batch(kind))
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(spread, lambda x: x):
        assert_close_to(run(model, make_batch(kind)), plain)


def transposed(x):
    return x.detach().transpose(0, -1).contiguous() if x.dim() > 1 else x


def back(x):
    return x.transpose(0, -1) if x.dim() > 1 else x


@pytest.mark.parametrize("by_module", [False, True], ids=["one op", "module by module"])
def test_saved_tensors_come_back_with_other_strides(by_module):
    model = fastbert.patch(make(BASE))
    for layer in model.encoder.layer if by_module else ():
        layer.output.dense.register_forward_hook(lambda *_: None)
    plain = run(model, make_batch(BASE))
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(transposed, back):
        assert_close_to(run(model, make_batch(BASE)), plain)


def assert_close_to(results, plain):
    # Products of tensors with other strides may sum in another order; a wrong stride is off by 1e-2 or more.
    for name, wanted in plain.items():
        torch.testing.assert_close(results[name], wanted, rtol=1e-5, atol=1e-6, msg=name)


MODULES = {
    "bert.encoder.layer.0.output": (56, 40),
    "bert.encoder.layer.0.intermediate": (40,),
    "cls.predictions.transform": (40,),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_second_derivative_raises_where_the_upstream_gradient_is_constant(name):
    # The gradient of a plain sum does not itself require a gradient, so autograd would treat the result of the backward as
    # a constant; with the input as a factor the penalty would be differentiated wrongly and silently.
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
