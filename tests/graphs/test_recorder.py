"""The stand-in for CUDA graphs: what a replay repeats, what it leaves behind, and what it forbids as a GPU does."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.graphs.capture import CudaRecorder, recorder_of
from fastbert.kernels.core.launch import counts
from fastbert.testing.graphs import TapeRecorder, recording_graphs
from fastbert.testing.rows import DEVICE
from tests.models.tiny import CLASSIFICATION, CLM, KINDS, MLM, make, make_batch

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs")

PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")


def capture(function, recorder=None):
    recorder = recorder or TapeRecorder()
    return recorder.capture(function)


def replayed(function):
    """The result of a graph's first replay."""
    graph, result = capture(function)
    graph.replay()
    return graph, result


def is_garbage(*tensors):
    return all(x.isnan().all() if x.is_floating_point() else (x == -7).all() for x in tensors)


class TestAReplay:
    def test_reads_what_was_written_in_place(self):
        x, weight = torch.randn(3, 4), torch.randn(4, 4)
        graph, y = replayed(lambda: (x @ weight).relu().sum(1))
        assert torch.equal(y, (x @ weight).relu().sum(1))
        x.copy_(torch.randn(3, 4))
        weight[0] = 5.0
        graph.replay()
        assert torch.equal(y, (x @ weight).relu().sum(1))

    def test_runs_no_python(self):
        calls, box = [], {"x": torch.ones(2), "factor": 2.0}

        def function():
            calls.append(1)
            return box["x"] * box["factor"]

        graph, y = capture(function)
        old = box["x"]
        box |= {"x": torch.zeros(2), "factor": 3.0}
        graph.replay()
        assert len(calls) == 1 and y.tolist() == [2.0, 2.0]
        old.add_(1.0)
        graph.replay()
        assert len(calls) == 1 and y.tolist() == [4.0, 4.0]

    def test_writes_through_views_and_out(self):
        x, total = torch.randn(4), torch.zeros(2, 2)

        def function():
            y = torch.empty_like(x)
            torch.mul(x, 2.0, out=y)
            y[1:3].add_(1.0)
            total.view(4).add_(y)
            return y.view(2, 2).t(), y[0]

        graph, (y, first) = capture(function)
        assert not total.any(), "undone"
        sum_of_all = torch.zeros(2, 2)
        for _ in range(3):
            x.normal_()
            graph.replay()
            expected = (2 * x + torch.tensor([0.0, 1.0, 1.0, 0.0])).view(2, 2)
            assert torch.equal(y, expected.t()) and first == expected[0, 0]
            sum_of_all += expected
        assert torch.equal(total, sum_of_all)

    def test_several_outputs_and_lists(self):
        x, others = torch.randn(6), [torch.zeros(2), torch.zeros(3)]

        def function():
            values, order = x.sort()
            torch._foreach_add_(others, [values[0], values[1]])
            return values, order, torch._foreach_mul(others, 2.0)

        graph, (values, order, doubled) = capture(function)
        graph.replay()
        x.neg_()
        graph.replay()
        expected, places = x.sort()
        assert torch.equal(values, expected) and torch.equal(order, places)
        assert torch.equal(doubled[1], 2 * others[1]) and others[0].tolist() == [float(-expected[5] + expected[0])] * 2

    def test_draws_anew(self):
        x, state = torch.ones(1000), torch.get_rng_state()
        graph, y = capture(lambda: nn.functional.dropout(x, 0.5))
        assert torch.equal(torch.get_rng_state(), state), "a capture draws nothing"
        graph.replay()
        first = y.clone()
        graph.replay()
        assert not torch.equal(first, y) and set(y.tolist()) == {0.0, 2.0}
        torch.set_rng_state(state)
        graph.replay()
        assert torch.equal(first, y), "torch.manual_seed holds for replays"

    def test_is_invisible(self):
        seen, x, leaf = [], torch.ones(2, 2), torch.ones(2, requires_grad=True)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **kwargs or {})

        def function():
            with torch.no_grad():
                leaf.add_(1.0)
            return x @ x

        graph, y = capture(function)
        versions = leaf._version, y._version
        with Watch(), torch.autocast("cpu", torch.bfloat16):
            graph.replay()
        assert not seen and (leaf._version, y._version) == versions
        assert leaf.tolist() == [2.0, 2.0] and y.dtype == torch.float32

    @pytest.mark.parametrize("captured_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    @pytest.mark.parametrize("replayed_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
    def test_in_any_mode(self, captured_in, replayed_in):
        layer, x = nn.Linear(3, 3), torch.randn(2, 3)
        with captured_in():
            graph, y = capture(lambda: layer(x).reshape(3, 2).add_(1.0))
        for _ in range(2):
            x.normal_()
            with replayed_in():
                graph.replay()
            assert torch.equal(y, (layer(x) + 1.0).reshape(3, 2))


class TestACapture:
    def test_computes_nothing(self):
        x, n, kept = torch.ones(2), torch.ones(2, dtype=torch.int64), {}

        def function():
            kept["more"] = x + 1
            x.zero_()
            return n + 1, x

        graph, (y, same) = capture(function)
        assert is_garbage(y, kept["more"]) and same is x and x.tolist() == [1.0, 1.0]
        graph.replay()
        assert y.tolist() == kept["more"].tolist() == [2, 2] and x.tolist() == [0.0, 0.0]

    def test_launches_count_once(self):
        model, batch = fastbert.patch(make(CLASSIFICATION)), make_batch(CLASSIFICATION, labels=False)
        forward(model, batch)
        before = counts.copy()
        graph, _ = capture(lambda: forward(model, batch))
        launched = counts - before
        graph.replay()
        assert launched["attention_fwd_kernel"] == 2 and counts - before == launched
        assert [step.name for step in graph.steps].count("attention_fwd_kernel") == 2

    def test_that_fails_leaves_everything_as_it_was(self):
        recorder, x, state = TapeRecorder(), torch.ones(2), torch.get_rng_state()

        def function():
            torch.rand(2, device=x.device)
            x.zero_()
            raise KeyError

        with pytest.raises(KeyError):
            recorder.capture(function)
        assert x.tolist() == [1.0, 1.0] and torch.equal(torch.get_rng_state(), state) and recorder.captures == 0
        replayed(lambda: x + 1)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: x.sum().item(),
            lambda x: float(x[0]),
            lambda x: bool(x.any()),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: x.cpu(),
            lambda x: x.to("cpu"),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.masked_select(x > 0),
            lambda x: x.unique(),
            lambda x: torch.equal(x, x),
            lambda x: torch.where(x > 0),
            lambda x: x.index_put_((x > 0,), torch.ones(4, device=x.device)),
            lambda x: torch.repeat_interleave(x.long()),
            lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
            lambda x: x.copy_(torch.tensor(1.0)),
            lambda x: x + torch.zeros(4),
            lambda x: torch.tensor(1.0, device=x.device),
            lambda x: x.new_tensor([1.0]),
            lambda x: x.normal_(generator=torch.Generator()),
            lambda x: repr(x),
        ],
    )
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_forbids_what_waits(self, function, mode):
        x = torch.ones(4)
        with pytest.raises(RuntimeError, match="not permitted while a graph is captured"), mode():
            capture(lambda: function(x))
        assert x.tolist() == [1.0] * 4

    def test_permits_what_looks_alike(self):
        x, ids = torch.ones(4), torch.tensor([2, 0])

        def function():
            x[x > 0] = 3.0  # it is masked_fill
            numbers = torch.tensor([1.0, 2.0])  # on the host, where reading them waits for nobody
            return x[ids] * sum(numbers.tolist()) * torch.tensor(2.0), torch.repeat_interleave(ids, ids, output_size=2)

        graph, (y, repeated) = replayed(function)
        assert y.tolist() == [18.0, 18.0] and repeated.tolist() == [2, 2]
        ids.copy_(torch.tensor([1, 1]))
        graph.replay()
        assert repeated.tolist() == [1, 1]


class TestSharedMemory:
    def test_only_what_is_referred_to_survives_a_replay(self):
        x, box = torch.ones(3), {}

        def function():
            inner = x + 1
            box["weak"] = inner.view(3)
            box["address"] = inner.data_ptr()
            return inner * 2, {"again": inner * 3}

        graph, result = capture(function)
        graph.replay()
        assert result[0].tolist() == [4.0] * 3 and box["weak"].tolist() == [2.0] * 3
        del box["weak"]
        graph.replay()
        inner = next(memory for memory in graph.memory if memory.storage.data_ptr() == box["address"])
        assert is_garbage(*inner.aliases.values()) and result[1]["again"].tolist() == [6.0] * 3

    def test_a_replay_overwrites_the_results_of_later_graphs(self):
        recorder, x = TapeRecorder(), torch.ones(2)
        graphs, results = zip(*(recorder.capture(lambda: x + 1) for _ in range(3)), strict=True)
        for graph in graphs:
            graph.replay()
        assert [y.tolist() for y in results] == [[2.0, 2.0]] * 3, "in the order of their captures"
        graphs[1].replay()
        assert results[0].tolist() == results[1].tolist() == [2.0, 2.0] and is_garbage(results[2])
        capture(lambda: x + 1)[0].replay()
        assert results[1].tolist() == [2.0, 2.0], "another recorder has other memory"

    def test_memory_that_was_given_up(self):
        box = {"x": torch.ones(2)}
        graph, _ = capture(lambda: box["x"] + 1)
        graph.replay()
        del box["x"]
        with pytest.raises(AssertionError, match="nobody else refers to"):
            graph.replay()

    def test_memory_that_only_two_graphs_refer_to(self):
        box, recorder = {"x": torch.ones(2)}, TapeRecorder()
        (one, _), (two, _) = (recorder.capture(lambda: box["x"][:1] * 2) for _ in range(2))
        del box["x"]
        for graph in (one, two):
            with pytest.raises(AssertionError, match="nobody else refers to"):
                graph.replay()

    def test_a_graph_that_is_dropped_frees_its_memory(self):
        x, freed = torch.ones(2), []
        graph, y = replayed(lambda: (x + 1) * 2)
        recorder = graph._recorder
        for memory in graph.memory:
            weakref.finalize(memory, freed.append, 1)
        expected = len(graph.memory)
        del graph, memory
        gc.collect()
        assert len(freed) == expected and not recorder.graphs and y.tolist() == [4.0, 4.0]

    def test_two_at_the_same_time(self):
        recorder, x = TapeRecorder(), torch.ones(2)
        graph, _ = recorder.capture(lambda: x + 1)
        other, _ = TapeRecorder().capture(lambda: x + 1)
        for function in (graph.replay, other.replay, lambda: recorder.capture(x.add), lambda: recorder.warm_up(x.add)):
            with pytest.raises(AssertionError, match="during a capture"):
                recorder.capture(function)
        begun, end, errors = threading.Event(), threading.Event(), []

        def slow():
            begun.set()
            end.wait(10)
            return x + 1

        thread = threading.Thread(target=lambda: recorder.capture(slow))
        thread.start()
        begun.wait(10)
        for function in (graph.replay, lambda: recorder.capture(lambda: x + 1)):
            with pytest.raises(AssertionError, match="at the same time"):
                function()
        other.replay()
        assert (x + 1).sum().item() == 4.0, "another thread may go on"
        end.set()
        thread.join()
        graph.replay()
        assert not errors and recorder.captures == 2 and recorder.replays == 1


def test_in_place_of_cuda():
    assert recorder_of(torch.device("cpu")) is None
    with recording_graphs() as recorders:
        recorder = recorder_of(torch.device("cpu"))
        assert recorders == [recorder]
        calls = []
        assert recorder.warm_up(lambda: calls.append(1) or len(calls)) == CudaRecorder.WARM_UP_CALLS == len(calls)
    assert recorder_of(torch.device("cpu")) is None


def forward(model, batch, budget=24):
    with torch.no_grad(), fastbert.lengths(model, token_budget=budget):
        return model(**batch)


class TestAModel:
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
