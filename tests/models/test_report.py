"""`report`: one row a module, calls counted one by one with the reason of each that fell back, and how it prints."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import fastbert
from tests.models.running import run
from tests.models.tiny import MLM, make, make_batch

FORWARD_ONLY = {"backward": False}


def rows(model):
    return {row.module: row for row in fastbert.report(model).rows}


def test_every_bert_part_has_its_row():
    report = rows(fastbert.patch(make()))
    layer = "bert.encoder.layer.1."
    kernels = {
        "": "linear_cross_entropy",
        "bert.embeddings": "embedding_layernorm",
        "bert.encoder": None,
        layer + "attention.self": "attention",
        layer + "attention.output": "dropout_add_layernorm",
        layer + "intermediate": "bias_gelu",
        layer + "output": "dropout_add_layernorm",
        "cls.predictions.transform": "gelu_layernorm",
    }
    assert {name: report[name].kernel for name in kernels} == kernels
    assert report[layer + "output"].hf_class == "BertOutput", "the stock class is named, not ours"
    assert len(report) == 4 + 2 * 4


def test_before_and_after_patching_nothing_is_active():
    model = make()
    for _ in range(2):
        assert {row.state for row in fastbert.report(model).rows} == {"untouched"}
        assert {row.reason for row in fastbert.report(model).rows if row.kernel} == {"not patched"}
        fastbert.unpatch(fastbert.patch(model, intermediate=False))


def test_each_call_is_counted():
    model = fastbert.patch(make())
    assert {row.reason for row in fastbert.report(model).rows if row.kernel} == {"not called yet"}
    for calls in (1, 2, 3):
        run(model, make_batch(), **FORWARD_ONLY)
        counted = [row for row in fastbert.report(model).rows if row.kernel]
        assert {(row.state, row.reason, row.kernel_calls) for row in counted} == {("active", "", calls)}


def test_each_fallback_is_counted_with_its_reason():
    model = fastbert.patch(make())
    output = model.bert.encoder.layer[0].output
    x, residual = torch.randn(2, 56, device=model.device), torch.randn(2, 40, device=model.device)
    output(x, residual)
    name = "bert.encoder.layer.0.output"

    handle = output.dropout.register_forward_hook(lambda *_: None)
    output(x, residual)
    output(x, residual)
    handle.remove()
    (hooked,) = rows(model)[name].fallback_calls
    assert "dropout" in hooked and "hooks" in hooked

    with pytest.raises(RuntimeError):  # stock's own error, since no kernel takes complex numbers
        output(x.to(torch.complex64), residual)
    row = rows(model)[name]
    assert row.kernel_calls == 1 and row.state == "active"
    assert row.fallback_calls == {hooked: 2, "torch.complex64 has no kernel": 1}
    assert all(reason in row.reason for reason in row.fallback_calls)


def test_fell_back_is_a_state_of_its_own():
    model = fastbert.patch(make())
    model.cls.predictions.transform.LayerNorm.register_forward_hook(lambda *_: None)
    run(model, make_batch(), **FORWARD_ONLY)
    row = rows(model)["cls.predictions.transform"]
    assert row.state == "fell back" and row.kernel_calls == 0 and list(row.fallback_calls.values()) == [1]
    assert "10 of 11 modules" in str(fastbert.report(model))


@pytest.mark.parametrize("again", ["unpatch and patch", "patched twice"])
def test_calls_are_counted_since_the_last_patch(again):
    model, batch = make(), make_batch()
    if again == "unpatch and patch":
        run(fastbert.patch(model), batch, **FORWARD_ONLY)
        fastbert.unpatch(model)
        fastbert.patch(model)
        run(model, batch, **FORWARD_ONLY)
        report = fastbert.report(model)
    else:
        for _ in range(2):
            with fastbert.patched(model):
                run(model, batch, **FORWARD_ONLY)
                report = fastbert.report(model)
    assert {row.kernel_calls for row in report.rows if row.kernel} == {1}


def test_layers_that_agree_share_a_line():
    model = fastbert.patch(make(num_hidden_layers=3))
    run(model, make_batch(), **FORWARD_ONLY)
    lines = str(fastbert.report(model)).splitlines()
    assert lines[0] == "fastbert on BertForMaskedLM: 15 of 15 modules that have a kernel are active"
    (line,) = [line for line in lines if "BertIntermediate" in line]
    assert line.split() == [
        "bert.encoder.layer.0-2.intermediate",
        "BertIntermediate",
        "bias_gelu",
        "active",
        "3",
        "0",
    ]
    assert all(line == line.rstrip() for line in lines)


def test_a_layer_that_differs_has_a_line_of_its_own():
    model = fastbert.patch(make(num_hidden_layers=3))
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda *_: None)
    run(model, make_batch(), **FORWARD_ONLY)
    lines = [line.split() for line in str(fastbert.report(model)).splitlines() if "BertOutput" in line]
    assert [line[0] for line in lines] == ["bert.encoder.layer.0-2.output", "bert.encoder.layer.1.output"]
    assert lines[0][3:6] == ["active", "2", "0"]
    assert lines[1][3:7] == ["fell", "back", "0", "1"] and "hooks" in lines[1]


def test_data_is_plain():
    model = fastbert.patch(make())
    run(model, make_batch(), **FORWARD_ONLY)
    report = fastbert.report(model)
    data = json.loads(json.dumps(report.to_dicts()))
    assert len(data) == len(report.rows)
    (row,) = [row for row in data if row["module"].endswith("layer.0.attention.output")]
    assert row == {
        "module": "bert.encoder.layer.0.attention.output",
        "hf_class": "BertSelfOutput",
        "kernel": "dropout_add_layernorm",
        "state": "active",
        "reason": "",
        "kernel_calls": 1,
        "fallback_calls": {},
    }


class Angle(nn.ReLU):
    """Its name goes into a reason, and from there into HTML."""


Angle.__name__ = "<b>&"


def test_notebook_table_is_escaped():
    model = make()
    model.cls.predictions.transform.transform_act_fn = Angle()
    text = fastbert.report(fastbert.patch(model))._repr_html_()
    assert "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert text.startswith("<table>") and text.endswith("</table>")
    assert text.count("<tr>") == text.count("</tr>") == 1 + 8  # headings, and eight groups
    assert "bert.encoder.layer.0-1.output" in text


def test_brackets_are_not_taken_for_colours():
    # rich would read [red] as markup and drop it.
    Brackets = type("[red]", (nn.ReLU,), {})
    model = make()
    model.cls.predictions.transform.transform_act_fn = Brackets()
    assert "activation [red]" in str(fastbert.report(fastbert.patch(model)))


def test_a_part_of_a_model_can_be_asked():
    model = fastbert.patch(make())
    run(model, make_batch(), **FORWARD_ONLY)
    (row,) = fastbert.report(model.cls).rows
    assert (row.module, row.kernel_calls) == ("predictions.transform", 1)


def test_a_model_without_bert_has_no_rows():
    report = fastbert.report(nn.Linear(2, 2))
    assert report.rows == () and "0 of 0" in str(report) and report.to_dicts() == []


def test_a_patched_model_is_let_go():
    # The tallies are kept beside the modules; they must not keep the modules.
    model = fastbert.patch(make(MLM))
    run(model, make_batch(), **FORWARD_ONLY)
    fastbert.report(model)
    gone = weakref.ref(model.bert.encoder.layer[0].output)
    del model
    gc.collect()
    assert gone() is None
