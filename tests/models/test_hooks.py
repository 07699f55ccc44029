"""Hooks fire: a hooked module is called as a module, or its layer falls back with a reason."""

import copy

import pytest
import torch
from torch import nn

import fastbert
from fastbert.testing.models import assert_equal, check, counting, doubled, expected_launches, launches_of, run
from tests.models.tiny import BASE, CLASSIFICATION, ROWS, make, make_batch

LAYER = "bert.encoder.layer.0."
HEAD = "cls.predictions.transform."

# The module with the hook, and the kernel that is then not used (a hooked Linear is called; its kernel still runs).
HOOKED = {
    LAYER + "attention.output.dense": None,
    LAYER + "intermediate.dense": None,
    LAYER + "output.dense": None,
    HEAD + "dense": None,
    LAYER + "attention.output.LayerNorm": "dropout_add_layernorm",
    LAYER + "output.LayerNorm": "dropout_add_layernorm",
    LAYER + "output.dropout": "dropout_add_layernorm",
    LAYER + "intermediate.intermediate_act_fn": "bias_gelu",
    HEAD + "transform_act_fn": "gelu_layernorm",
    HEAD + "LayerNorm": "gelu_layernorm",
    # On patched modules and on those around them, torch calls the hooks.
    LAYER + "output": None,
    LAYER + "intermediate": None,
    LAYER.rstrip("."): None,
    "cls.predictions.transform": None,
}
HOOKS = {
    "forward": lambda module, fire: module.register_forward_hook(lambda *_: fire()),
    "pre-forward": lambda module, fire: module.register_forward_pre_hook(lambda *_: fire()),
    "backward": lambda module, fire: module.register_full_backward_hook(lambda *_: fire()),
    "pre-backward": lambda module, fire: module.register_full_backward_pre_hook(lambda *_: fire()),
}


def without_outputs(model):
    """Expected launches without the kernel of BertOutput."""
    expected = expected_launches(model)
    for way in ("fwd", "bwd"):
        expected[f"dropout_add_layernorm_{way}_kernel"] -= len(model.bert.encoder.layer)
    return expected


def without_one(model, kernel):
    expected = expected_launches(model)
    if kernel:
        expected[f"{kernel}_fwd_kernel"] -= 1
        expected[f"{kernel}_bwd_kernel"] -= 1
    return +expected


# Every place with the common hook, and every kind of hook in one place of each kind.
PLACES = [(name, "forward") for name in HOOKED] + [
    (name, hook)
    for name in (LAYER + "output.dense", HEAD + "LayerNorm", LAYER + "output.dropout", HEAD + "transform_act_fn")
    for hook in HOOKS
    if hook != "forward"
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("name", "hook"), PLACES)
def test_a_hook_added_after_patching_fires(name, hook):
    model, batch, fired = make(attention="sdpa"), make_batch(), []
    stock = run(copy.deepcopy(model), batch)
    exact = run(copy.deepcopy(model).double(), doubled(batch))
    expected = without_one(model, HOOKED[name])
    handle = HOOKS[hook](fastbert.patch(model).get_submodule(name), lambda: fired.append(name))
    with counting() as launched:
        assert_equal(run(model, batch), stock, exact)
    assert fired == [name]
    assert launched == expected
    report = {row.module: row for row in fastbert.report(model).rows}
    if HOOKED[name] or name.startswith(LAYER):
        reasons = {reason for row in report.values() for reason in row.fallback_calls}
        assert reasons and all("hooks" in reason for reason in reasons)
        assert report["bert.encoder.layer.1"].kernel_calls == 1, "only what has a hook runs module by module"
    handle.remove()
    with counting() as launched:
        run(model, batch)
    assert fired == [name] and launched == expected_launches(model), "the kernel is back when the hook is gone"


def test_a_hook_that_changes_the_output_is_honoured():
    model = make()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.register_forward_hook(lambda module, inputs, output: output * 2)
        layer.output.dropout.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    check(model, make_batch(), expected=without_outputs(model))


def test_a_hook_on_every_module_of_the_process_fires():
    model, batch = make(attention="sdpa"), make_batch()
    fastbert.patch(model)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        with counting() as launched:
            run(model, batch)
    finally:
        handle.remove()
    assert {model.get_submodule(name) for name in HOOKED} <= seen
    assert launched == launches_of("attention", 2, 2), "what attention replaces are no modules"


def masks_seen_by(handle_of, model, batch):
    """The tensors among the arguments of a module that its hook sees."""
    seen = []

    def keep(module, args, kwargs, *output):
        named = {**dict(enumerate(args)), **kwargs}
        seen.append({name: value for name, value in named.items() if "mask" in str(name) or name == 1})

    handle = handle_of(keep)
    model(**batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["encoder", "encoder.layer.0", "encoder.layer.1.attention", "encoder.layer.0.attention.self"])
@pytest.mark.parametrize("kind", ["forward", "pre-forward"])
def test_a_hook_sees_the_mask_that_stock_gives(kind, name, attention):
    model, batch = make(BASE, attention=attention), make_batch(BASE, labels=False)
    module = model.get_submodule(name)
    register = {"forward": module.register_forward_hook, "pre-forward": module.register_forward_pre_hook}[kind]
    stock = masks_seen_by(lambda hook: register(hook, with_kwargs=True), model, batch)
    patched = masks_seen_by(lambda hook: register(hook, with_kwargs=True), fastbert.patch(model), batch)
    assert len(stock) == len(patched) == 1 and stock[0].keys() == patched[0].keys()
    masks = [value for value in stock[0].values() if isinstance(value, torch.Tensor)]
    assert masks, "the hook saw no mask: it proves nothing"
    for key, value in stock[0].items():
        assert type(value) is type(patched[0][key])
        if isinstance(value, torch.Tensor):
            assert value.dtype == patched[0][key].dtype and torch.equal(value, patched[0][key])


def test_a_hook_on_eager_attention_gets_its_weights():
    model, batch, seen = make(BASE), make_batch(BASE, labels=False), []
    for module in (model.encoder.layer[0].attention.self, model.encoder.layer[1].attention):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    model(**batch)
    fastbert.patch(model)(**batch)
    assert len(seen) == 4 and all(isinstance(weights, torch.Tensor) for weights in seen)
    for stock, patched in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(patched, stock)


@pytest.mark.parametrize("name", ["bert.pooler", "bert.encoder.layer.1.attention.output"])
def test_a_hook_before_the_backward_keeps_the_batch_padded(name):
    """register_full_backward_pre_hook, which is easily overlooked."""
    model, batch, shapes = make(CLASSIFICATION, attention="sdpa"), make_batch(CLASSIFICATION), []
    fastbert.patch(model)
    model.get_submodule(name).register_full_backward_pre_hook(lambda module, grads: shapes.extend(g.shape for g in grads))
    with counting(heads=True) as launched:
        run(model, batch)
    assert shapes and all(shape[0] == ROWS for shape in shapes)
    assert not launched["gather_rows_kernel"]
