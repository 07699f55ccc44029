"""Patching changes only classes: everything else in a model is the same object before, during and after."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM, BertForMaskedLM
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert.registry import BY_FAST
from fastbert.testing.models import KERNELS, MLM_HEADS, POOLED, assert_bitwise, check, counting, expected_launches, run
from tests.models.tiny import KINDS, MLM, config, make, make_batch


def contents(model):
    """The identities of all objects in a module's __dict__, its parameters and submodules included."""

    def identity(value):
        return {key: id(item) for key, item in value.items()} if isinstance(value, dict) else id(value)

    return {
        name: (id(module), {key: identity(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_classes_change(kind):
    model = make(kind)
    before, types, parameters = contents(model), classes(model), list(model.named_parameters())
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}

    assert fastbert.patch(model) is model
    assert contents(model) == before
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    for name, module in model.named_modules():
        packs = types[name] is bert.BertEncoder and isinstance(model, POOLED)
        if types[name] in (bert.BertModel, bert.BertLayer, *KERNELS, *POOLED, *MLM_HEADS) or packs:
            assert type(module) is not types[name] and isinstance(module, types[name])
            # accelerate, save_pretrained, pipelines and Trainer look classes up by name.
            assert type(module).__name__ == types[name].__name__
        else:
            assert type(module) is types[name]

    assert fastbert.unpatch(model) is model
    assert contents(model) == before and classes(model) == types


def test_unpatched_is_bitwise_as_before():
    model = make(hidden_dropout_prob=0.2).train()
    before = contents(model)
    torch.manual_seed(1)
    stock = run(model, make_batch())
    with counting() as launched:
        run(fastbert.patch(model), make_batch())
    assert launched == expected_launches(model)
    model.zero_grad()
    # Neither forward nor backward leaves anything on a module, except the state of a layer.
    patched = contents(model)
    looked_at = [own.pop("_fastbert_state", None) for _, own in patched.values()]
    assert patched == before and len(list(filter(None, looked_at))) == model.config.num_hidden_layers
    torch.manual_seed(1)
    with counting() as launched:
        assert_bitwise(run(fastbert.unpatch(model), make_batch()), stock)
    assert not launched
    model.zero_grad()
    assert contents(model) == before


def test_patching_twice_is_patching_once():
    model = fastbert.patch(make())
    once = classes(model)
    assert fastbert.patch(model) is model and classes(model) == once
    fastbert.unpatch(model)
    assert not {type(module) for module in model.modules()} & set(once.values()) - set(classes(make()).values())


def test_unpatching_what_was_not_patched_changes_nothing():
    for model in (make(), nn.Linear(2, 2)):
        before, types = contents(model), classes(model)
        assert fastbert.unpatch(model) is model
        assert contents(model) == before and classes(model) == types


class MyOutput(bert.BertOutput):
    """A user's subclass."""

    def forward(self, hidden_states, input_tensor):
        return 2.0 * super().forward(hidden_states, input_tensor)


def test_a_users_subclass_is_left_alone():
    model = make()
    model.bert.encoder.layer[1].output.__class__ = MyOutput
    expected = expected_launches(model)
    for way in ("fwd", "bwd"):
        expected[f"dropout_add_layernorm_{way}_kernel"] -= 1
    check(model, make_batch(), expected=expected)
    fastbert.patch(model)
    assert type(model.bert.encoder.layer[1].output) is MyOutput
    (row,) = [row for row in fastbert.report(model).rows if row.module == "bert.encoder.layer.1.output"]
    assert row.hf_class == "MyOutput" and row.state == "untouched" and "subclass" in row.reason
    fastbert.unpatch(model)
    assert type(model.bert.encoder.layer[1].output) is MyOutput


def test_a_second_model_on_the_same_config_is_untouched():
    shared = config()
    teacher, student = BertForMaskedLM(shared).eval(), BertForMaskedLM(shared).eval()
    before, types, settings = contents(teacher), classes(teacher), shared.to_dict()
    stock = run(teacher, make_batch())
    fastbert.patch(student)
    teacher.zero_grad()
    assert contents(teacher) == before and classes(teacher) == types
    assert shared.to_dict() == settings and student.config is shared
    with counting() as launched:
        assert_bitwise(run(teacher, make_batch()), stock)
    assert not launched
    with counting() as launched:
        run(student, make_batch())
    assert launched == expected_launches(student)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_save_pretrained_writes_the_stock_class(kind, tmp_path):
    model = fastbert.patch(make(kind))
    model.save_pretrained(tmp_path)
    loaded = kind.cls.from_pretrained(tmp_path)
    assert loaded.config.architectures == [kind.cls.__name__]
    assert classes(loaded) == classes(make(kind))
    state = model.state_dict()
    assert_bitwise(loaded.state_dict(), state)


def test_from_pretrained_then_patch(tmp_path):
    stock = make()
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).to(stock.device)
    check(loaded, make_batch())


def test_weights_loaded_while_patched_are_used():
    model, other = fastbert.patch(make(seed=1)), make(seed=2)
    model.load_state_dict(other.state_dict())
    assert_bitwise(run(model, make_batch()), run(fastbert.patch(other), make_batch()))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_patched_and_independent(way):
    model = fastbert.patch(make())
    results = run(model, make_batch())
    copied = way(model)
    assert classes(copied) == classes(model)
    with counting() as launched:
        assert_bitwise(run(copied, make_batch()), results)
    assert launched == expected_launches(model)
    fastbert.unpatch(copied)
    assert classes(copied) == classes(make()) and classes(model) != classes(copied)
    calls = {row.kernel_calls for row in fastbert.report(model).rows if row.kernel}
    assert calls == {1}, "a copy's calls are its own"


@pytest.mark.parametrize("cls", BY_FAST, ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}")
def test_a_fast_class_is_found_by_its_address_and_has_stocks_name(cls):
    """pickle and torch.save (protocol 2) find it by address, `save_pretrained` and pipelines by name."""
    assert all(pickle.loads(pickle.dumps(cls, protocol)) is cls for protocol in (2, pickle.DEFAULT_PROTOCOL))
    assert cls.__name__ == BY_FAST[cls].stock.__name__ and issubclass(cls, BY_FAST[cls].stock)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_signatures_stay(kind):
    # Trainer chooses columns by the model's signature; those of modules are part of transformers' interface.
    stock, patched = make(kind), fastbert.patch(make(kind))
    assert inspect.signature(patched.forward) == inspect.signature(stock.forward)
    for name, module in stock.named_modules():
        if type(module) in KERNELS:
            ours = inspect.signature(patched.get_submodule(name).forward)
            assert list(ours.parameters) == list(inspect.signature(module.forward).parameters)


def test_a_model_without_memory_is_patched():
    with torch.device("meta"):
        model = fastbert.patch(BertForMaskedLM(config()))
        logits = model(torch.ones(2, 5, dtype=torch.long)).logits
    assert logits.device.type == "meta" and logits.shape == (2, 5, 61)
    stock = make()
    model = model.to_empty(device=stock.device).eval()
    for name, buffer in stock.named_buffers():
        model.get_buffer(name).copy_(buffer)
    model.load_state_dict(stock.state_dict())
    with counting() as launched:
        loss = model(**make_batch()).loss
    assert launched == expected_launches(stock, backward=False)
    torch.testing.assert_close(loss, stock(**make_batch()).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_changed_after_patching(dtype):
    model = fastbert.patch(make(MLM)).to(dtype)
    with counting() as launched:
        results = run(model, make_batch())
    assert launched == expected_launches(model)
    assert_bitwise(results, run(fastbert.patch(make(MLM, dtype)), make_batch()))
