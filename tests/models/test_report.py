"""`report`: one row per module, counted calls with a reason per fallback, and how it prints."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import fastbert
from fastbert.testing.models import run
from tests.models.tiny import MLM, make, make_batch

FORWARD_ONLY = {"backward": False}


def rows(model):
    return {row.module: row for row in fastbert.report(model).rows}


OUTSIDE = {
    "": "linear_cross_entropy",
    "bert.embeddings": "embedding_layernorm",
    "bert.encoder": None,
    "cls.predictions.transform": "gelu_layernorm",
}
LAYER = "attention, dropout_add_layernorm, bias_gelu"
INSIDE = {
    ".attention.self": "attention",
    ".attention.output": "dropout_add_layernorm",
    ".intermediate": "bias_gelu",
    ".output": "dropout_add_layernorm",
}
LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")


def test_every_bert_part_has_its_row():
    report = rows(fastbert.patch(make()))
    assert {name: row.kernel for name, row in report.items()} == OUTSIDE | dict.fromkeys(LAYERS, LAYER)
    assert report[LAYERS[1]].hf_class == "BertLayer", "the stock class is named, not ours"


def by_module(layer):
    """A model whose layers run module by module, because of a hook between them."""
    return layer.output.dense.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("called", [False, True])
def test_a_layer_that_runs_module_by_module_has_a_row_for_each(called):
    model = fastbert.patch(make())
    by_module(model.bert.encoder.layer[1])
    if called:
        run(model, make_batch(), **FORWARD_ONLY)
    report = rows(model)
    inside = {LAYERS[1] + name: kernel for name, kernel in INSIDE.items()}
    assert {name: row.kernel for name, row in report.items()} == OUTSIDE | dict.fromkeys(LAYERS, LAYER) | inside
    layer = report[LAYERS[1]]
    assert layer.state == "module by module" and layer.kernel_calls == 0 and "hooks" in layer.reason
    assert report[LAYERS[0]].state == "active"
    classes = {"BertSelfAttention", "BertSelfOutput", "BertIntermediate", "BertOutput"}
    assert {report[name].hf_class for name in inside} == classes
    assert "8 of 8 modules" in str(fastbert.report(model)), "its own modules count in place of the layer"


def test_modules_that_were_called_keep_their_rows():
    """Their rows appear beside that of their layer, which has run as one op since."""
    model = fastbert.patch(make())
    handle = by_module(model.bert.encoder.layer[0])
    run(model, make_batch(), **FORWARD_ONLY)
    handle.remove()
    run(model, make_batch(), **FORWARD_ONLY)
    report = rows(model)
    layer = report[LAYERS[0]]
    assert (layer.state, layer.kernel_calls, list(layer.fallback_calls.values())) == ("active", 1, [1])
    assert {name: report[LAYERS[0] + name].kernel_calls for name in INSIDE} == dict.fromkeys(INSIDE, 1)
    assert not any(name.startswith(f"{LAYERS[1]}.") for name in report)


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

    with pytest.raises(RuntimeError):  # stock's error: no kernel takes complex numbers
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
    assert "4 of 5 modules" in str(fastbert.report(model))


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


def test_other_switches_start_all_counts_again():
    model, batch = make(), make_batch()
    fastbert.patch(model)
    run(model, batch, **FORWARD_ONLY)
    fresh = fastbert.report(model)
    fastbert.patch(model)
    assert fastbert.report(model) == fresh  # nothing changed
    fastbert.patch(model, attention=False)
    run(model, batch, **FORWARD_ONLY)
    assert len(fastbert.report(model).rows) > len(fresh.rows)
    fastbert.patch(model)
    assert all(row.reason == "not called yet" for row in fastbert.report(model).rows if row.kernel)
    run(model, batch, **FORWARD_ONLY)
    assert fastbert.report(model) == fresh


def test_layers_that_agree_share_a_line():
    model = fastbert.patch(make(num_hidden_layers=3))
    run(model, make_batch(), **FORWARD_ONLY)
    lines = str(fastbert.report(model)).splitlines()
    assert lines[0] == "fastbert on BertForMaskedLM: 6 of 6 modules that have a kernel are active"
    (at,) = [at for at, line in enumerate(lines) if "BertLayer: " in line]
    assert lines[at - 1].split() == ["bert.encoder.layer.0-2", "active", "3", "0"]
    assert " ".join(" ".join(lines[at : at + 2]).split()) == f"BertLayer: {LAYER}"
    assert all(line == line.rstrip() for line in lines)


def test_a_layer_that_differs_has_a_line_of_its_own():
    model = fastbert.patch(make(num_hidden_layers=3))
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda *_: None)
    run(model, make_batch(), **FORWARD_ONLY)
    report = str(fastbert.report(model)).splitlines()
    lines = [report[at - 1].split() for at, line in enumerate(report) if "BertLayer: " in line]
    assert lines[0] == ["bert.encoder.layer.0-2", "active", "2", "0"]
    assert lines[1][:-1] == ["bert.encoder.layer.1", "module", "by", "module", "0", "1"]
    (reason,) = [line for line in report if line.startswith(f"{lines[1][-1]} ")]
    assert reason.startswith(f"{lines[1][-1]} output: LayerNorm ")
    (line,) = [report[at - 1].split() for at, line in enumerate(report) if "BertOutput: " in line]
    assert line[:-1] == ["bert.encoder.layer.1.output", "fell", "back", "0", "1"]
    assert any(reason.startswith(f"{line[-1]} LayerNorm ") and "hooks" in reason for reason in report)


def test_data_is_plain():
    model = fastbert.patch(make())
    run(model, make_batch(), **FORWARD_ONLY)
    report = fastbert.report(model)
    data = json.loads(json.dumps(report.to_dicts()))
    assert len(data) == len(report.rows)
    (row,) = [row for row in data if row["module"].endswith("layer.0")]
    assert row == {
        "module": "bert.encoder.layer.0",
        "hf_class": "BertLayer",
        "kernel": LAYER,
        "state": "active",
        "reason": "",
        "kernel_calls": 1,
        "fallback_calls": {},
    }


class Angle(nn.ReLU):
    """A module whose name appears in a reason, and so in HTML."""


Angle.__name__ = "<b>&"


def test_notebook_table_is_escaped():
    model = make()
    model.cls.predictions.transform.transform_act_fn = Angle()
    text = fastbert.report(fastbert.patch(model))._repr_html_()
    assert "&lt;b&gt;&amp;" in text and "<b>" not in text
    assert text.startswith("<table>") and text.endswith("</table>")
    assert text.count("<tr>") == text.count("</tr>") == 1 + 5  # headings, and five groups
    assert "bert.encoder.layer.0-1<" in text


def test_brackets_are_not_taken_for_colours():
    # rich would read [red] as markup and drop it.
    Brackets = type("[red]", (nn.ReLU,), {})
    model = make()
    model.cls.predictions.transform.transform_act_fn = Brackets()
    assert "activation [red]" in str(fastbert.report(fastbert.patch(model)))


def test_report_of_a_part_of_a_model():
    model = fastbert.patch(make())
    run(model, make_batch(), **FORWARD_ONLY)
    (row,) = fastbert.report(model.cls).rows
    assert (row.module, row.kernel_calls) == ("predictions.transform", 1)


def test_a_model_without_bert_has_no_rows():
    report = fastbert.report(nn.Linear(2, 2))
    assert report.rows == () and "0 of 0" in str(report) and report.to_dicts() == []


def test_a_patched_model_is_let_go():
    # The tallies must not keep the modules alive.
    model = fastbert.patch(make(MLM))
    run(model, make_batch(), **FORWARD_ONLY)
    fastbert.report(model)
    gone = weakref.ref(model.bert.encoder.layer[0].output)
    del model
    gc.collect()
    assert gone() is None
