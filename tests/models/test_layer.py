"""What a layer is made of may change at any time: the next call notices, gives stock's numbers and says why it runs module
by module; once the change is undone the layer is one op again."""

import copy
import functools
import itertools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert import ops
from tests.models.running import assert_bitwise, assert_equal, doubled, run
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
    """In the interpreter, which is not called by address, an op takes parameters from anywhere."""
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
    """`_forward_hooks = OrderedDict()` is how hooks are often removed."""
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


# A change takes a layer and returns what undoes it.


def changed(name, attribute, value):
    """Of the module `name`; `value` takes what is there."""

    def change(layer):
        module = layer.get_submodule(name)
        before = getattr(module, attribute)
        setattr(module, attribute, value(before))
        return functools.partial(setattr, module, attribute, before)

    return change


def replaced(name, new):
    """The module of that name, by what `new` makes of it."""
    parent, _, attribute = name.rpartition(".")
    return changed(parent, attribute, new)


def parameter(name, value):
    parent, _, attribute = name.rpartition(".")
    return changed(parent, attribute, lambda before: nn.Parameter(value(before.detach())))


def data(name, value):
    """Given other memory through `.data`, as `value` makes it of the old one's."""

    def change(layer):
        tensor = layer.get_parameter(name)
        before = tensor.data
        tensor.data = value(before)
        return functools.partial(setattr, tensor, "data", before)

    return change


def anew(name, registry, child, value):
    """Its child, a module or a parameter, in a registry of its own, as engines that move parameters make one."""

    def change(layer):
        module = layer.get_submodule(name)
        before = getattr(module, registry)
        setattr(module, registry, {**before, child: value(before[child])})
        return functools.partial(setattr, module, registry, before)

    return change


def together(*changes):
    def change(layer):
        undo = [each(layer) for each in changes]
        return lambda: [each() for each in undo]

    return change


def own_forward(name, of_class=False):
    """Of one module, or of its class: twice what it gave, or for attention its first output so."""

    def twice(outputs):
        return (2 * outputs[0], *outputs[1:]) if isinstance(outputs, tuple) else 2 * outputs

    def change(layer):
        module = layer.get_submodule(name)
        if not of_class:
            forward = module.forward
            module.forward = lambda *args, **kwargs: twice(forward(*args, **kwargs))
            return lambda: delattr(module, "forward")
        cls = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("fastbert"))
        forward = cls.forward
        cls.forward = lambda *args, **kwargs: twice(forward(*args, **kwargs))
        return lambda: setattr(cls, "forward", forward)

    return change


def chunk_of_its_own(layer):
    layer.feed_forward_chunk = lambda hidden_states: hidden_states
    return lambda: delattr(layer, "feed_forward_chunk")


def lora(layer):
    before = layer.attention.self.query
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), layer)
    for p in layer.attention.self.query.parameters():
        if p.requires_grad:
            p.data.copy_(torch.linspace(-1.0, 1.0, p.numel()).view(p.shape))

    def undo():
        layer.attention.self.query = before
        layer.requires_grad_()  # which peft took away

    return undo


def parametrized(name, by):
    def change(layer):
        module = layer.get_submodule(name)
        before = module.weight.detach().clone()
        by(module)

        def undo():
            parametrize.remove_parametrizations(module, "weight")
            module.weight = nn.Parameter(before)

        return undo

    return change


def narrowed(view):
    """The feed-forward of 24 columns in place of 56."""

    def cut(x):
        return x if view else x.contiguous()

    return together(
        data("intermediate.dense.weight", lambda w: w[:24]),
        data("intermediate.dense.bias", lambda b: b[:24]),
        data("output.dense.weight", lambda w: cut(w[:, :24])),
    )


def unaligned(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def strided(x):
    return x.repeat_interleave(2, dim=1)[:, ::2]


def written(layer):
    """As an average of weights is swapped in: the address stays."""
    before = [p.detach().clone() for p in layer.parameters()]
    for p in layer.parameters():
        p.data.copy_(1.1 * p.data + 0.01)
    return lambda: [p.data.copy_(old) for p, old in zip(layer.parameters(), before, strict=True)]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubling(linear):
    made = Doubling(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)
    made.load_state_dict(linear.state_dict())
    return made


class Subclass(torch.Tensor):
    """As DTensor is one."""


def scaled_copy(module):
    made = copy.deepcopy(module)
    made.weight.data.mul_(1.5)
    return made


# What the op goes on for, with the new numbers.
SEEN = {
    "another Linear": replaced("attention.output.dense", scaled_copy),
    "another LayerNorm": replaced("output.LayerNorm", scaled_copy),
    "another dropout": replaced("output.dropout", lambda _: nn.Dropout(0.0)),
    "another part": replaced("intermediate", copy.deepcopy),
    "new parameter": parameter("attention.self.key.weight", lambda w: 1.5 * w),
    "new bias": parameter("output.LayerNorm.bias", lambda b: b + 0.5),
    "parameters in a new dict": anew("output.dense", "_parameters", "weight", lambda w: nn.Parameter(1.5 * w.detach())),
    "modules in a new dict": anew("attention.output", "_modules", "LayerNorm", scaled_copy),
    "moved": data("attention.self.query.weight", lambda w: 1.5 * w),
    "written": written,
    "narrower": narrowed(view=False),
    "eps": changed("attention.output.LayerNorm", "eps", lambda _: 0.3),
    "second eps": changed("output.LayerNorm", "eps", lambda _: 0.3),
    "scaling": changed("attention.self", "scaling", lambda s: 3.0 * s),
    "head size": changed("attention.self", "attention_head_size", lambda _: 10),
    "relu": replaced("intermediate.intermediate_act_fn", lambda _: nn.ReLU()),
    "tanh": replaced("intermediate.intermediate_act_fn", lambda _: nn.GELU(approximate="tanh")),
}
# What it does not, and a word of the reason that is given.
REFUSED = {
    "subclass of Linear": (replaced("attention.self.value", doubling), "Doubling"),
    "LoRA": (lora, "attention.self.query is a Linear"),
    "Identity for LayerNorm": (replaced("attention.output.LayerNorm", lambda _: nn.Identity()), "Identity"),
    "Identity for dropout": (replaced("output.dropout", lambda _: nn.Identity()), "Identity"),
    "Identity for a product": (replaced("attention.output.dense", lambda _: nn.Identity()), "Identity"),
    "own forward of a part": (own_forward("intermediate"), "intermediate has"),
    "own forward of a Linear": (own_forward("output.dense"), "output.dense"),
    "own forward of LayerNorm": (own_forward("attention.output.LayerNorm"), "LayerNorm"),
    "own chunk": (chunk_of_its_own, "or of its own"),
    "transposed": (data("attention.self.query.weight", torch.t), "query is not contiguous"),
    "strided": (data("output.dense.weight", strided), "output is not contiguous"),
    "unaligned matrix": (data("intermediate.dense.weight", unaligned), "multiple of 16 bytes"),
    "unaligned vector": (data("output.LayerNorm.weight", unaligned), "multiple of 16 bytes"),
    "narrower by a view": (narrowed(view=True), "output is not contiguous"),
    "orthogonal": (parametrized("attention.self.query", parametrizations.orthogonal), "ParametrizedLinear"),
    "weight norm": (parametrized("intermediate.dense", parametrizations.weight_norm), "ParametrizedLinear"),
    "subclass of Tensor": (parameter("output.dense.weight", lambda w: w.as_subclass(Subclass)), "no plain tensor"),
    "no bias": (changed("output.dense", "bias", lambda _: None), "no plain tensor"),
    "LayerNorm without bias": (changed("output.LayerNorm", "bias", lambda _: None), "no plain tensor"),
    "scaling by a tensor": (changed("attention.self", "scaling", lambda s: torch.tensor(2.0 * s)), "a scale of scores"),
    "mish": (replaced("intermediate.intermediate_act_fn", lambda _: nn.Mish()), "activation Mish"),
    "chunks": (changed("", "chunk_size_feed_forward", lambda _: 3), "chunks"),
}
# What makes every layer of the process run module by module.
REFUSED_ALL = {
    "Linear": (own_forward("output.dense", of_class=True), "Linear"),
    "Dropout": (own_forward("output.dropout", of_class=True), "dropout"),
    "activation": (own_forward("intermediate.intermediate_act_fn", of_class=True), "activation"),
    "BertSelfAttention": (own_forward("attention.self", of_class=True), "BertSelfAttention.forward"),
    "BertIntermediate": (own_forward("intermediate", of_class=True), "BertIntermediate.forward"),
    "BertOutput": (own_forward("output", of_class=True), "BertOutput.forward"),
    "BertAttention": (own_forward("attention", of_class=True), "BertAttention.forward"),
    "BertLayer": (own_forward("", of_class=True), "BertLayer.forward"),
}
# What one layer does with masks that the others are given, too: each gets stock's.
REFUSED_WITH_MASKS = {
    "own forward": (own_forward("attention"), "attention has"),
    "own forward below": (own_forward("attention.self"), "attention.self has"),
}
CHANGES = (
    {f"seen: {name}": (change, None) for name, change in SEEN.items()}
    | {f"refused: {name}": change for name, change in REFUSED.items()}
    | {f"in all: {name}": change for name, change in REFUSED_ALL.items()}
    | {f"masks: {name}": change for name, change in REFUSED_WITH_MASKS.items()}
)
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
        assert second.kernel_calls == (2 if name.startswith("refused") else 1)
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
    """Its attention's, which somebody replaced after a call."""
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
    """What comes of it; None for an error."""
    try:
        return run(model, batch, backward=False)
    except RuntimeError:
        return None


@pytest.mark.parametrize("name", ["output.LayerNorm", "intermediate", "attention.self.query"])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_a_part_of_another_type(name, dtypes):
    """Stock's mixture, or stock's error."""
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
    assert "a head size of 7" in layer_row(patched).reason


@pytest.mark.parametrize("name", ["attention.self.dropout", "attention.output.dropout", "output.dropout"])
def test_one_dropout_by_itself(name):
    """Its probability and its mode are read at each call; attention's mode is that of the attention."""
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
