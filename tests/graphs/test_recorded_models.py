"""Models, training steps and threads on the stand-in for CUDA graphs: replays give what calls give."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert
from fastbert.kernels.core.launch import counts
from fastbert.testing.graphs import TapeRecorder, recording_graphs
from fastbert.testing.rows import DEVICE
from tests.models.tiny import CLASSIFICATION, CLM, KINDS, MLM, make, make_batch

from .test_recorder import capture, is_garbage

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs")

PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")


def forward(model, batch, budget=24):
    with torch.no_grad(), fastbert.lengths(model, token_budget=budget):
        return model(**batch)


class TestAModel:
    def test_launches_count_once(self):
        model, batch = fastbert.patch(make(CLASSIFICATION)), make_batch(CLASSIFICATION, labels=False)
        forward(model, batch)
        before = counts.copy()
        graph, _ = capture(lambda: forward(model, batch))
        launched = counts - before
        graph.replay()
        assert launched["attention_fwd_kernel"] == 2 and counts - before == launched
        assert [step.name for step in graph.steps].count("attention_fwd_kernel") == 2

    def test_inputs_and_weights_that_change(self):
        model, batch = fastbert.patch(make(CLASSIFICATION)), make_batch(CLASSIFICATION, labels=False)
        recorder = TapeRecorder()
        expected = recorder.warm_up(lambda: forward(model, batch)).logits
        graph, result = recorder.capture(lambda: forward(model, batch))
        assert is_garbage(result.logits)
        graph.replay()
        assert torch.equal(result.logits, expected)
        for name, x in make_batch(CLASSIFICATION, "holes", seed=5, labels=False).items():
            batch[name].copy_(x)
        graph.replay()
        assert torch.equal(result.logits, forward(model, batch).logits) and not torch.equal(result.logits, expected)
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 1.1)
        graph.replay()
        expected = forward(model, batch).logits
        assert torch.equal(result.logits, expected)

        old, bias = model.classifier.bias, torch.zeros(3)
        model.classifier.bias = nn.Parameter(bias)
        model.train()
        graph.replay()
        assert torch.equal(result.logits, expected), "of the parameter that was captured"
        del old
        with pytest.raises(AssertionError, match="nobody else refers to"):
            graph.replay()

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not CLM], ids=str)
    def test_every_head(self, kind):
        """MLM heads count their labels unless they are given a read_budget, so here they have none."""
        arguments = {"mask": "none", "labels": kind not in (MLM, PRETRAINING)}
        model, batch = fastbert.patch(make(kind)), make_batch(kind, **arguments)

        def function():
            with torch.inference_mode():
                return model(**batch)

        recorder = TapeRecorder()
        recorder.warm_up(function)
        graph, result = recorder.capture(function)
        for name, x in make_batch(kind, **arguments, seed=7).items():
            batch[name].copy_(x)
        graph.replay()
        expected = function()
        assert expected.keys() == result.keys()
        for name, x in expected.items():
            torch.testing.assert_close(result[name], x, rtol=0, atol=0)

    def test_a_mask_that_is_made_from_a_number(self):
        """transformers' causal mask copies a number to the device, which no graph permits."""
        model, batch = make(CLM), make_batch(CLM, "none", labels=False)
        model(**batch)
        with pytest.raises(RuntimeError, match="tensor copies from the host"):
            capture(lambda: model(**batch))


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "torch's AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AdamW": lambda params: fastbert.AdamW(params, lr=1e-2, capturable=True),
}


class TestATrainingStep:
    @pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_replays_are_steps(self, make_optimizer):
        stock = make(CLASSIFICATION, num_hidden_layers=1).train()
        batch, losses = make_batch(CLASSIFICATION), {}

        def step(model, optimizer):
            optimizer.zero_grad(set_to_none=True)
            with fastbert.lengths(model, token_budget=24):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        models = [fastbert.patch(copy.deepcopy(stock)) for _ in range(2)]
        (graphed, model), optimizers = models, [make_optimizer(model.parameters()) for model in models]
        for each, optimizer in zip(models, optimizers, strict=True):
            step(each, optimizer)
        before = copy.deepcopy(graphed.state_dict())
        graph, loss = capture(lambda: step(graphed, optimizers[0]))
        assert all(torch.equal(before[name], x) for name, x in graphed.state_dict().items()), "undone"
        for seed in range(3):
            for name, x in make_batch(CLASSIFICATION, seed=seed).items():
                batch[name].copy_(x)
            graph.replay()
            losses[seed] = loss.item()
            assert losses[seed] == step(model, optimizers[1]).item()
        for (name, x), y in zip(graphed.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)
            torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0, msg=name)
        assert len(set(losses.values())) == 3

    def test_fresh_dropout(self):
        probabilities = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
        model = fastbert.patch(make(CLASSIFICATION, num_hidden_layers=1, **probabilities)).train()
        batch, found = make_batch(CLASSIFICATION), []

        def function():
            with fastbert.lengths(model, token_budget=24):
                return model(**batch).loss.detach()

        recorder = TapeRecorder()
        recorder.warm_up(function)
        graph, loss = recorder.capture(function)
        for _ in range(3):
            torch.manual_seed(len(found) % 2)
            graph.replay()
            found.append(loss.item())
        torch.manual_seed(0)
        assert found[0] == found[2] != found[1] and function().item() == found[0]

    def test_accumulation_clipping_and_a_rate_on_the_device(self):
        """Gradients from before the capture are added to; a rate in a tensor is read at each replay."""
        layers, x = [nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(4, 3)
        layers[1].load_state_dict(layers[0].state_dict())
        rates = [torch.tensor(0.1), torch.tensor(0.1)]
        optimizers = [
            fastbert.AdamW(layer.parameters(), lr=rate, capturable=True) for layer, rate in zip(layers, rates, strict=True)
        ]

        def step(layer, optimizer):
            optimizer.zero_grad(set_to_none=False)
            for half in x.chunk(2):
                layer(half).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
            optimizer.step()
            return norm

        for layer, optimizer in zip(layers, optimizers, strict=True):
            step(layer, optimizer)
        grads = [parameter.grad for parameter in layers[0].parameters()]
        graph, norm = capture(lambda: step(layers[0], optimizers[0]))
        for number in range(3):
            x.normal_()
            for rate in rates:
                rate.fill_(0.1 / (number + 1))
            graph.replay()
            assert norm == step(layers[1], optimizers[1])
        for one, other, grad in zip(*(layer.parameters() for layer in layers), grads, strict=True):
            assert torch.equal(one, other) and one.grad is grad and torch.equal(grad, other.grad)

    def test_checkpointing_that_restores_the_generator(self):
        x = torch.randn(3, requires_grad=True)

        def function(**arguments):
            checkpoint(torch.sin, x, use_reentrant=False, **arguments).sum().backward()

        with pytest.raises(RuntimeError, match="sets the generator"):
            capture(function)
        x.grad = None
        graph, _ = capture(lambda: function(preserve_rng_state=False))
        graph.replay()
        assert torch.equal(x.grad, x.detach().cos())

    def test_an_optimizer_without_state(self):
        weight = nn.Parameter(torch.ones(4))
        weight.grad = torch.ones(4)
        with pytest.raises(RuntimeError, match="take one step before"):
            capture(fastbert.AdamW([weight], capturable=True).step)

    def test_an_optimizer_that_waits(self):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="not permitted"):
            capture(optimizer.step)
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())

    def test_a_scaler(self):
        """A step with an infinite gradient is skipped, and the scale halves, on the device."""
        weight, x = nn.Parameter(torch.ones(4)), torch.ones(4)
        optimizer = fastbert.AdamW([weight], lr=0.1, capturable=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def step():
            optimizer.zero_grad()
            scaler.scale((weight * x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

        step()
        graph, _ = capture(step)
        before = weight.detach().clone()
        x[0] = float("inf")
        graph.replay()
        assert torch.equal(weight, before) and scaler.get_scale() == 32.0
        x[0] = 1.0
        graph.replay()
        assert (weight < before).all() and scaler.get_scale() == 32.0


def test_a_masked_language_model_without_logits():
    model, batch = fastbert.patch(make(MLM), mlm_logits="none").train(), make_batch(MLM)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)

    def function():
        with fastbert.lengths(model, token_budget=24, read_budget=12):
            return model(**batch).loss

    recorder = TapeRecorder()
    expected = recorder.warm_up(function).item()
    graph, loss = recorder.capture(function)
    graph.replay()
    assert loss.item() == expected


def test_threads():
    """Each thread replays a graph of its own recorder while others call the model; kernels do not disturb each other."""
    model, kind = fastbert.patch(make(CLASSIFICATION, num_hidden_layers=1)), CLASSIFICATION
    batches = [make_batch(kind, "none", seed, labels=False) for seed in range(4)]
    expected = [forward(model, batch).logits for batch in batches]
    wrong, done, start = [], [], threading.Barrier(4)

    def serve(number):
        batch = {name: x.clone() for name, x in batches[number].items()}
        start.wait(10)
        if number % 2:
            recorder = TapeRecorder()
            graph, result = recorder.capture(lambda: run(batch))
        for turn in range(6):
            for name, x in batches[(number + turn) % 4].items():
                batch[name].copy_(x)
            if number % 2:
                graph.replay()
            else:
                result = run(batch)
            if not torch.equal(result.logits, expected[(number + turn) % 4]):
                wrong.append((number, turn))
        done.append(number)

    def run(batch):
        with torch.inference_mode():
            return model(**batch)

    with recording_graphs():
        threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and len(done) == 4
