"""How graphs are asked for and taken away, and what is refused."""

import pytest
import torch
from torch import nn

import fastbert
from fastbert.graphs.classes import graphs_of
from fastbert.testing.rows import DEVICE
from tests.graphs.support import close, infer, make_graphed, make_inputs, row_of
from tests.models.tiny import BASE, CLASSIFICATION, MLM, make

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs"),
    pytest.mark.usefixtures("recorders"),
]


class TestApi:
    def test_switches(self):
        model = fastbert.patch(make(CLASSIFICATION), cuda_graphs=True)
        infer(model, make_inputs())
        assert row_of(model).kernel_calls == 1
        fastbert.patch(model)
        assert graphs_of(model) is None
        fastbert.graphed(fastbert.graphed(model))
        fastbert.unpatch(model)
        assert type(model) is CLASSIFICATION.cls and "_fastbert_graphs" not in vars(model)

    def test_patched_restores_graphs(self):
        model = make_graphed(max_graphs=3)
        with fastbert.patched(model, cuda_graphs=False):
            assert graphs_of(model) is None
        assert graphs_of(model).options.max_graphs == 3
        infer(model, make_inputs())
        assert row_of(model).kernel_calls == 1

    def test_inside_another_module(self):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.encoder = make(BASE)

            def forward(self, **batch):
                return self.encoder(**batch).pooler_output

        model, batch = fastbert.patch(Wrapper(), cuda_graphs=True), make_inputs(BASE)
        assert torch.equal(infer(model, batch), infer(model, batch))
        assert row_of(model).module == "encoder" and row_of(model).kernel_calls == 2

    @pytest.mark.parametrize("patch", [True, False])
    def test_a_graphed_model_that_became_a_part_of_another(self, patch):
        model, batch = make(CLASSIFICATION), make_inputs()
        model.bert = make_graphed(BASE)
        fastbert.patch(model, cuda_graphs=True) if patch else fastbert.graphed(model)
        assert graphs_of(model.bert) is None
        infer(model, batch)
        assert row_of(model).kernel_calls == 1
        fastbert.unpatch(model)
        assert all("fastbert" not in type(module).__module__ for module in model.modules())

    def test_hooks_of_accelerate(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        model, batch = make(BASE), make_inputs(BASE, "none")
        batch.pop("attention_mask", None)
        add_hook_to_module(model, ModelHook())
        expected = infer(model, batch)
        fastbert.patch(model, cuda_graphs=True)
        close(infer(model, batch), expected)
        assert row_of(model).kernel_calls or row_of(model).fallback_calls, "the hook calls the forward with graphs"
        fastbert.unpatch(model)
        assert model._old_forward.__func__ is BASE.cls.forward
        close(infer(model, batch), expected)

    def test_compiled(self):
        """A compiler traces the model without its graphs."""
        model, batch = make_graphed(BASE), make_inputs(BASE)
        infer(model, batch)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(infer(compiled, batch), infer(model, batch))
        assert row_of(model).kernel_calls == 2 and not row_of(model).fallback_calls

    def test_save_pretrained(self, tmp_path):
        model, batch = make_graphed(), make_inputs()
        model.save_pretrained(tmp_path)
        loaded = CLASSIFICATION.cls.from_pretrained(tmp_path)
        assert loaded.config.architectures == ["BertForSequenceClassification"]
        close(infer(model, batch), infer(loaded, batch))

    def test_hidden_states_of_an_ordinary_call(self):
        model, stock, batch = make_graphed(BASE), make(BASE), make_inputs(BASE)
        found, expected = (
            infer(model, batch | {"output_hidden_states": True}),
            infer(stock, batch | {"output_hidden_states": True}),
        )
        assert len(found.hidden_states) == len(expected.hidden_states) == 3

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"buckets": [(1, 0)]},
                ValueError,
                r"buckets: expected \(rows, length\) pairs of integers from 1 on, got \(1, 0\)",
            ),
            ({"buckets": []}, ValueError, "buckets: expected"),
            ({"buckets": [128]}, ValueError, "buckets: expected .* got 128"),
            ({"max_graphs": 0}, ValueError, "max_graphs: expected an integer from 1 on, got 0"),
            ({"max_graphs": True}, ValueError, "max_graphs: expected"),
            ({"reuse_outputs": 1}, TypeError, "reuse_outputs: expected True or False, got 1"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        model = fastbert.patch(make(CLASSIFICATION))
        with pytest.raises(error, match=message):
            fastbert.graphed(model, **arguments)
        assert graphs_of(model) is None

    def test_models(self):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            fastbert.graphed("bert")
        with pytest.raises(
            fastbert.UnsupportedModelError, match="expected one patched by fastbert.patch, got a stock BertModel"
        ):
            fastbert.graphed(make(BASE))
        layers = make(BASE).encoder
        with pytest.raises(fastbert.UnsupportedModelError, match=r"expected a model of BERT \(BertModel, BertFor"):
            fastbert.patch(layers, cuda_graphs=True)
        assert type(layers).__module__.startswith("transformers"), "left as it was"
        with pytest.raises(ValueError, match="model: expected one that fastbert.graphed was called on"):
            fastbert.warmup(fastbert.patch(make(BASE)), [(1, 8)])

    def test_disabled(self, monkeypatch):
        monkeypatch.setenv("FASTBERT_DISABLE", "1")
        model = fastbert.graphed(fastbert.patch(make(BASE)))
        assert type(model) is BASE.cls

    def test_signature(self):
        import inspect

        for kind in (BASE, MLM, CLASSIFICATION):
            model = make_graphed(kind)
            assert inspect.signature(model.forward) == inspect.signature(make(kind).forward)
