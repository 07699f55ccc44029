"""A layer may change at any time: the next call notices, gives stock's numbers and the reason why it runs module
by module. After the change is undone, the layer is one op again."""

import copy
import functools
import itertools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert import ops
from fastbert.testing.models import assert_bitwise, assert_equal, doubled, run
from tests.models.layer_changes import CHANGES
from tests.models.tiny import BASE, make, make_batch

INSIDE = (
    *("attention", "attention.self", "attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output", "attention.output.dense", "attention.output.LayerNorm", "attention.output.dropout"),
    *("intermediate", "intermediate.dense", "intermediate.intermediate_act_fn"),
    *("output", "output.dense", "output.LayerNorm", "output.dropout"),
)
HOOKS = {
    "forward": nn.Module.register_forward_hook,
    "pre-forward": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "pre-backward": nn.Module.register_full_backward_pre_hook,
}


@pytest.fixture(autouse=True)
def _addresses_as_on_a_device(monkeypatch):
    """Require alignment as on a device; in the interpreter an op accepts parameters at any address."""
    monkeypatch.setattr(ops, "ALIGNMENT", 16)


def rows(model):
    return {row.module: row for row in fastbert.report(model).rows}


def layer_row(model, index=0):
    return rows(model)[f"encoder.layer.{index}"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_inside_fires(hook):
    model, batch = make(BASE, num_hidden_layers=1, attention="sdpa"), make_batch(BASE, length=4)
    patched, backward = fastbert.patch(copy.deepcopy(model)), "backward" in hook
    expected = run(patched, batch, backward)
    fired = []

    def with_hook(model, name):
        handle = HOOKS[hook](model.encoder.layer[0].get_submodule(name), lambda *_: fired.append((model, name)))
        results = run(model, batch, backward)
        handle.remove()
        return results

    for calls, name in enumerate(INSIDE, 1):
        torch.testing.assert_close(with_hook(patched, name), with_hook(model, name))
        assert fired[-2:] == [(patched, name), (model, name)] and len(fired) == 2 * calls
        row = layer_row(patched)
        assert sum(row.fallback_calls.values()) == calls and all("hooks" in reason for reason in row.fallback_calls)
    assert_bitwise(run(patched, batch, backward), expected)
    assert layer_row(patched).kernel_calls == 2, "one op again when the hooks are gone"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_in_a_new_dict_fires(hook):
    """Hooks are often removed by `_forward_hooks = OrderedDict()`."""
    patched, batch, fired = fastbert.patch(make(BASE, num_hidden_layers=1)), make_batch(BASE, length=4), []
    run(patched, batch, "backward" in hook)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module, kind in itertools.product(patched.encoder.layer[0].modules(), kinds):
        setattr(module, kind, OrderedDict())
    for name in INSIDE:
        HOOKS[hook](patched.encoder.layer[0].get_submodule(name), lambda module, *_: fired.append(module) or None)
    run(patched, batch, "backward" in hook)
    assert len(fired) == len(INSIDE)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_on_every_module_of_the_process(kind):
    patched, batch, seen = fastbert.patch(make(BASE, attention="sdpa")), make_batch(BASE, length=4), set()
    run(patched, batch)
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda module, *_: seen.add(module) or None)
    try:
        run(patched, batch)
    finally:
        handle.remove()
    assert {patched.encoder.layer[0].get_submodule(name) for name in INSIDE} <= seen
    run(patched, batch)
    row = layer_row(patched)
    assert row.kernel_calls == 2 and len(row.fallback_calls) == 1


MODEL, BATCH = make(BASE, attention="sdpa"), make_batch(BASE)


@functools.cache
def before():
    return run(fastbert.patch(copy.deepcopy(MODEL)), BATCH)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_and_its_end(name):
    change, word = CHANGES[name]
    plain = before()
    stock, exact, patched = copy.deepcopy(MODEL), copy.deepcopy(MODEL).double(), fastbert.patch(copy.deepcopy(MODEL))
    run(patched, BATCH, backward=False)
    undo = change(patched.encoder.layer[0])
    try:
        results = run(patched, BATCH)
        if not name.startswith("in all"):
            change(stock.encoder.layer[0])
            change(exact.encoder.layer[0])
        eager = run(stock, BATCH)
        assert_equal(results, eager, run(exact, doubled(BATCH)))
        assert word or not torch.equal(eager["last_hidden_state"], plain["last_hidden_state"])
    finally:
        undo()
    first, second = layer_row(patched), layer_row(patched, 1)
    if word is None:
        assert first.kernel_calls == second.kernel_calls == 2 and not first.fallback_calls
    else:
        ((reason, calls),) = first.fallback_calls.items()
        assert calls == 1 and first.kernel_calls == 1 and word in reason
        assert second.kernel_calls == (2 if name.startswith("unsupported") else 1)
    assert_bitwise(run(patched, BATCH), plain)
    assert layer_row(patched).kernel_calls == first.kernel_calls + 1, "one op again"


def test_gelus_form_is_read_again():
    stock = copy.deepcopy(MODEL)
    stock.encoder.layer[0].intermediate.intermediate_act_fn = nn.GELU()
    patched = fastbert.patch(copy.deepcopy(stock))
    run(patched, BATCH, backward=False)
    for model in (stock, patched):
        model.encoder.layer[0].intermediate.intermediate_act_fn.approximate = "tanh"
    results = run(patched, BATCH)
    assert_equal(results, run(stock, BATCH), run(copy.deepcopy(stock).double(), doubled(BATCH)))
    assert layer_row(patched).kernel_calls == 2


def test_a_function_as_activation_is_read_again():
    patched = fastbert.patch(copy.deepcopy(MODEL))
    results = []
    for function in (F.gelu, F.silu, torch.tanh, F.gelu):
        stock = copy.deepcopy(MODEL)
        for model in (stock, patched):
            intermediate = model.encoder.layer[0].intermediate
            intermediate._modules.pop("intermediate_act_fn", None)
            intermediate.intermediate_act_fn = function
        results.append(run(patched, BATCH))
        assert_equal(results[-1], run(stock, BATCH), run(copy.deepcopy(stock).double(), doubled(BATCH)))
    row = layer_row(patched)
    assert row.kernel_calls == 3 and list(row.fallback_calls) == ["intermediate: activation tanh has no kernel"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_causality_changed_by_hand(attention):
    model, batch = make(BASE, attention=attention), make_batch(BASE, "none")
    patched = fastbert.patch(copy.deepcopy(model))
    run(patched, batch, backward=False)
    for who in (model, patched):
        who.encoder.layer[0].attention.self.is_causal = True
    assert_equal(run(patched, batch), run(model, batch), run(copy.deepcopy(model).double(), doubled(batch)))


def test_a_layer_looks_at_a_config_of_its_own():
    """The config of its attention, replaced after a call."""
    model = make(BASE, attention="sdpa")
    patched = fastbert.patch(copy.deepcopy(model))
    run(patched, BATCH, backward=False)
    for who in (model, patched):
        attention = who.encoder.layer[0].attention.self
        attention.config = copy.deepcopy(attention.config)
        attention.config._attn_implementation = "eager"
    assert_equal(run(patched, BATCH), run(model, BATCH), run(copy.deepcopy(model).double(), doubled(BATCH)))
    assert "mask" in layer_row(patched).reason


def outcome(model, batch):
    """The results; None for an error."""
    try:
        return run(model, batch, backward=False)
    except RuntimeError:
        return None


@pytest.mark.parametrize("name", ["output.LayerNorm", "intermediate", "attention.self.query"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_part_of_another_type(name, dtypes):
    """Mixed dtypes give stock's result, or stock's error."""
    model = make(BASE, dtypes[0], attention="sdpa")
    patched = fastbert.patch(copy.deepcopy(model))
    run(patched, BATCH, backward=False)
    for who in (model, patched):
        who.encoder.layer[1].get_submodule(name).to(dtypes[1])
    stock, found = outcome(model, BATCH), outcome(patched, BATCH)
    assert (found is None) == (stock is None)
    if stock is not None:
        assert_equal(found, stock, run(model.double(), BATCH, backward=False))
    ((reason, _),) = layer_row(patched, 1).fallback_calls.items()
    assert str(dtypes[1]) in reason
    patched.to(dtypes[0])
    run(patched, BATCH, backward=False)
    assert layer_row(patched, 1).kernel_calls == 2


def test_a_head_size_that_does_not_divide():
    patched = fastbert.patch(copy.deepcopy(MODEL))
    run(patched, BATCH, backward=False)
    stock = copy.deepcopy(MODEL)
    for model in (stock, patched):
        model.encoder.layer[0].attention.self.attention_head_size = 7
    assert outcome(patched, BATCH) is outcome(stock, BATCH) is None
    assert "head size 7" in layer_row(patched).reason


@pytest.mark.parametrize("name", ["attention.self.dropout", "attention.output.dropout", "output.dropout"])
def test_one_dropout_by_itself(name):
    """Its probability and training mode are read at each call; the mode for attention is the attention module's."""
    patched = fastbert.patch(copy.deepcopy(MODEL)).train()
    plain, dropout = before(), patched.encoder.layer[1].get_submodule(name)

    def drops():
        return not torch.equal(run(patched, BATCH, backward=False)["last_hidden_state"], plain["last_hidden_state"])

    assert not drops()
    dropout.p = 0.5
    assert drops()
    switched = patched.encoder.layer[1].attention.self if "self" in name else dropout
    switched.training = False
    assert not drops()
    switched.training = True
    assert drops()
    dropout.p = 0.0
    assert not drops()
    assert layer_row(patched, 1).kernel_calls == 5


def test_a_layer_that_was_never_plain_says_so_before_it_is_called():
    model = copy.deepcopy(MODEL)
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Mish()
    row = layer_row(fastbert.patch(model))
    assert (row.state, row.reason) == ("module by module", "intermediate: activation Mish has no kernel")
    assert layer_row(model, 1).state == "active"


def test_stock_layers_are_other_classes():
    assert {type(layer) for layer in MODEL.encoder.layer} == {bert.BertLayer}, "a test changed the model of all"
