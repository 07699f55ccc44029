"""Whatever changes in a model after a capture shows in its next call: nothing stale, ever."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface
from transformers.models.bert import modeling_bert

import fastbert
from fastbert.testing.rows import DEVICE
from tests.graphs.changes import CHANGES as UNREGISTERED
from tests.graphs.changes import forward_on_a_linear
from tests.graphs.support import close, infer, make_graphed, make_inputs, ordinary, row_of
from tests.models.layer_changes import CHANGES
from tests.models.tiny import BASE, CLASSIFICATION, make, make_batch

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs"),
    pytest.mark.usefixtures("recorders"),
]


class TestStaleness:
    @pytest.mark.one_in(4)
    @pytest.mark.parametrize("name", CHANGES)
    def test_a_change_in_a_layer(self, name):
        change, _ = CHANGES[name]
        model, batch = make_graphed(BASE), make_inputs(BASE)
        before = infer(model, batch)
        assert row_of(model).kernel_calls == 1
        undo = change(model.encoder.layer[0])
        try:
            close(infer(model, batch), ordinary(model, batch))
        finally:
            undo()
        close(infer(model, batch), before)

    def test_a_change_outside_layers(self):
        model, batch = make_graphed(CLASSIFICATION), make_inputs()
        for change in (
            lambda: model.classifier.weight.data.mul_(2.0),
            lambda: setattr(model, "classifier", nn.Linear(40, 3)),
            lambda: setattr(model.bert.pooler, "activation", nn.ReLU()),
            lambda: setattr(model.bert.embeddings.LayerNorm, "eps", 0.5),
            lambda: model.bert.embeddings.position_ids.copy_(model.bert.embeddings.position_ids.flip(1)),
            lambda: model.bert.embeddings.word_embeddings.weight.data.neg_(),
            lambda: model.resize_token_embeddings(70),
            lambda: model.bert.encoder.layer.pop(1),
            lambda: model.set_attn_implementation("sdpa"),
            lambda: model.bert.pooler.dense.register_forward_hook(lambda module, inputs, output: 2.0 * output),
        ):
            infer(model, batch)
            with torch.no_grad():
                change()
            close(infer(model, batch), ordinary(model, batch))

    def test_weights_written_in_place_need_no_new_capture(self, recorders):
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        captures = sum(recorder.captures for recorder in recorders)
        model.load_state_dict(make(CLASSIFICATION, seed=7).state_dict())
        close(infer(model, batch), ordinary(model, batch))
        assert sum(recorder.captures for recorder in recorders) == captures

    def test_training_between_two_inferences(self):
        model, batch = make_graphed(), make_batch(CLASSIFICATION)
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        first = infer(model, inputs)
        for _ in range(2):
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            close(infer(model, inputs), ordinary(model, inputs))
        assert not torch.equal(first.logits, infer(model, inputs).logits)
        assert row_of(model).fallback_calls["train mode"] == 2

    def test_a_submodule_in_train_mode(self):
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        model.dropout.train()
        infer(model, batch)
        assert row_of(model).fallback_calls == {"a module in train mode": 1}
        model.eval()
        infer(model, batch)
        assert row_of(model).kernel_calls == 2

    def test_another_dtype(self):
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        model.half()
        found = infer(model, batch)
        assert found.logits.dtype == torch.float16
        assert torch.equal(found.logits, infer(model, batch).logits)
        model.float()
        close(infer(model, batch), ordinary(model, batch))

    def test_autocast_is_a_graph_of_its_own(self):
        model, batch = make_graphed(BASE), make_inputs(BASE)
        plain = infer(model, batch)
        with torch.autocast("cpu", torch.float16):
            close(infer(model, batch), ordinary(model, batch))
            with torch.no_grad():
                model.encoder.layer[0].output.dense.weight.mul_(2.0)
            torch.clear_autocast_cache()
            close(infer(model, batch), ordinary(model, batch))
        assert not torch.equal(infer(model, batch).last_hidden_state, plain.last_hidden_state)

    def test_a_model_that_changes_at_every_call_gets_no_graphs(self):
        model, batch = make_graphed(), make_inputs()
        for i in range(8):
            model.classifier.weight = nn.Parameter(torch.full((3, 40), 0.01 * i))
            close(infer(model, batch), ordinary(model, batch))
        assert "weights or modules change from call to call" in row_of(model).fallback_calls

    def test_other_weights_of_a_copy(self):
        model, batch = make_graphed(), make_inputs()
        infer(model, batch)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                other.classifier.weight.neg_()
            close(infer(other, batch), ordinary(other, batch))
            assert row_of(other).kernel_calls == 1 and type(other) is type(model)
        close(infer(model, batch), ordinary(model, batch))


def check(model, batch, change):
    """Calls after a change are those of the changed model, and a replay would have been one of another."""
    infer(model, batch)
    before = infer(model, batch)
    assert row_of(model).kernel_calls or row_of(model).fallback_calls
    with torch.no_grad():
        change(model)
    expected = ordinary(model, batch)
    assert not torch.allclose(expected[-1], before[-1])
    for _ in range(2):
        close(infer(model, batch), expected)


class TestWhatIsNotRegistered:
    @pytest.mark.parametrize("name", UNREGISTERED)
    def test_a_change(self, name):
        activation, change = UNREGISTERED[name]
        model = make_graphed(BASE)
        model.pooler.activation = activation()
        check(model, make_inputs(BASE), change)

    def test_a_forward_on_a_module_is_replaced_by_another(self):
        model = make_graphed(BASE)
        forward_on_a_linear(2.0)(model)
        check(model, make_inputs(BASE), forward_on_a_linear(3.0))

    def test_functions_of_transformers(self, monkeypatch):
        stock = modeling_bert.eager_attention_forward

        def doubled(*args, **kwargs):
            output, weights = stock(*args, **kwargs)
            return 2.0 * output, weights

        batch = make_inputs(BASE, "none")
        model = make(BASE)
        model.set_attn_implementation("eager")
        model = fastbert.graphed(fastbert.patch(model, attention=False))
        check(model, batch, lambda model: monkeypatch.setattr(modeling_bert, "eager_attention_forward", doubled))
        monkeypatch.undo()
        monkeypatch.setattr(AttentionInterface, "_global_mapping", AttentionInterface._global_mapping)
        known = dict(AttentionInterface._global_mapping)
        try:
            AttentionInterface.register("fastbert_test", stock)
            model = make_graphed(BASE)
            model.set_attn_implementation("fastbert_test")
            batch.pop("attention_mask", None)
            check(model, batch, lambda model: AttentionInterface.register("fastbert_test", doubled))
            assert row_of(model).kernel_calls
        finally:
            AttentionInterface._global_mapping.clear()
            AttentionInterface._global_mapping.update(known)

    def test_weights_that_a_context_caches(self):
        class Doubled(nn.Module):
            def forward(self, weight):
                return 2.0 * weight

        model, batch = make_graphed(BASE), make_inputs(BASE)
        parametrize.register_parametrization(model.pooler.dense, "weight", Doubled())
        model.eval()
        with parametrize.cached():
            infer(model, batch)
        assert row_of(model).fallback_calls == {"inside torch.nn.utils.parametrize.cached": 1}
        check(model, batch, lambda model: model.pooler.dense.parametrizations.weight.original.mul_(3.0))


class Mean(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.mean(1)


class TestWhatReadsPadding:
    """Modules for which a batch must not stand in a larger bucket."""

    @pytest.mark.parametrize("change", ["pooler", "forward", "activation", "attention"])
    def test_of_the_user(self, change):
        model, batch = make_graphed(BASE), make_inputs(BASE, "none")
        batch.pop("attention_mask", None)
        pooler = model.pooler
        if change == "pooler":
            model.pooler = Mean().eval()
        elif change == "forward":
            pooler.forward = lambda hidden_states: hidden_states.mean(1)
        elif change == "activation":
            pooler.activation = nn.Softmax(0).eval()
        else:
            AttentionInterface.register("fastbert_test", modeling_bert.eager_attention_forward)
            model.set_attn_implementation("fastbert_test")  # without masks, for none is registered
        try:
            for _ in range(2):
                close(infer(model, batch), ordinary(model, batch))
        finally:
            AttentionInterface._global_mapping.pop("fastbert_test", None)
        assert row_of(model).kernel_calls == 2


class TestChangesDuringACapture:
    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    def test_of_a_weight(self, at):
        """Another thread may replace a weight at any forward: two to warm up, the captured one, and an ordinary one."""
        model, batch, calls = make_graphed(BASE), make_inputs(BASE), []

        class Replacing(nn.Tanh):
            def forward(self, x):
                calls.append(1)
                if len(calls) == at:
                    with torch.inference_mode(False):
                        model.pooler.dense.weight = nn.Parameter(torch.ones(40, 40))
                return super().forward(x)

        model.pooler.activation = Replacing().eval()
        infer(model, batch)
        for _ in range(2):
            close(infer(model, batch), ordinary(model, batch))

    def test_older_graphs_are_dropped(self):
        model, batch, calls = make_graphed(BASE), make_inputs(BASE), []

        class Replacing(nn.Tanh):
            def forward(self, x):
                calls.append(1)
                if len(calls) == 4:  # the first forward for a second graph
                    with torch.inference_mode(False):
                        model.pooler.dense.weight = nn.Parameter(torch.ones(40, 40))
                return super().forward(x)

        model.pooler.activation = Replacing().eval()
        infer(model, batch)
        infer(model, make_inputs(BASE, length=20))
        assert len(calls) == 6
        close(infer(model, batch), ordinary(model, batch))

    def test_by_the_forward_itself(self):
        class Counting(nn.Module):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return self.calls * x

        model, batch = make_graphed(BASE), make_inputs(BASE)
        model.pooler.activation = Counting().eval()
        first = infer(model, batch).pooler_output / model.pooler.activation.calls
        for _ in range(7):
            torch.testing.assert_close(infer(model, batch).pooler_output / model.pooler.activation.calls, first)
        assert set(row_of(model).fallback_calls) == {
            "the model changed during a capture",
            "weights or modules change from call to call",
        }
