"""patch is atomic: a failure half-way, an exception inside `patched`, and the state before."""

import dataclasses

import pytest
from torch import nn
from transformers.models.bert import modeling_bert as bert

import fastbert
from fastbert import registry
from fastbert.testing.models import counting, expected_launches, run
from tests.models.test_patch import classes, contents
from tests.models.tiny import make, make_batch

SWAPPED = 8  # modules of a tiny masked-language model that change their class


class Slotted(bert.BertPredictionHeadTransform):
    """A class that cannot be assigned to an existing object, because its memory layout differs."""

    __slots__ = ("extra",)


def test_a_class_that_cannot_be_set_is_rolled_back(monkeypatch):
    entry = registry.BY_STOCK[bert.BertPredictionHeadTransform]
    monkeypatch.setitem(registry.BY_STOCK, entry.stock, dataclasses.replace(entry, fast=Slotted))
    model = make()
    before, types = contents(model), classes(model)
    with pytest.raises(TypeError, match="layout"):
        fastbert.patch(model)
    assert contents(model) == before and classes(model) == types
    assert all(row.reason == "not patched" for row in fastbert.report(model).rows if row.kernel)
    with counting() as launched:
        run(model, make_batch())
    assert not launched


@pytest.fixture
def fail_at(monkeypatch):
    """A function that makes the n-th assignment of a class raise, once."""

    def arm(n):
        changes = iter(range(1000))
        setattr_of_module = nn.Module.__setattr__

        def refuse(module, name, value):
            if name == "__class__" and next(changes) == n:
                raise KeyboardInterrupt
            setattr_of_module(module, name, value)

        monkeypatch.setattr(nn.Module, "__setattr__", refuse)

    return arm


@pytest.mark.parametrize("n", [0, 3, SWAPPED - 1])
def test_patch_that_is_interrupted(fail_at, n):
    model = make()
    before, types = contents(model), classes(model)
    fail_at(n)
    with pytest.raises(KeyboardInterrupt):
        fastbert.patch(model)
    assert contents(model) == before and classes(model) == types


@pytest.mark.parametrize("n", [0, 3, SWAPPED - 1])
def test_unpatch_that_is_interrupted(fail_at, n):
    model = fastbert.patch(make())
    run(model, make_batch())
    types, report = classes(model), fastbert.report(model)
    fail_at(n)
    with pytest.raises(KeyboardInterrupt):
        fastbert.unpatch(model)
    assert classes(model) == types and fastbert.report(model) == report


@pytest.mark.parametrize("n", [0, 3, SWAPPED - 1])
def test_a_change_of_switches_that_is_interrupted(fail_at, n):
    model = fastbert.patch(make(), residual_norm=False)
    types, report = classes(model), fastbert.report(model)
    fail_at(n)
    with pytest.raises(KeyboardInterrupt):
        fastbert.patch(model, intermediate=False)
    assert classes(model) == types and fastbert.report(model) == report


def test_patched_gives_the_model_and_takes_the_kernels_out_again():
    model = make()
    before, types = contents(model), classes(model)
    with fastbert.patched(model) as same:
        assert same is model
        with counting() as launched:
            run(model, make_batch())
        assert launched == expected_launches(model)
    model.zero_grad()
    assert contents(model) == before and classes(model) == types
    with counting() as launched:
        run(model, make_batch())
    assert not launched


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_patched_restores_on_an_exception(error):
    model = make()
    types = classes(model)
    with pytest.raises(error), fastbert.patched(model):
        assert classes(model) != types
        raise error
    assert classes(model) == types


@pytest.mark.parametrize("inside", ["nothing", "unpatch", "patch otherwise", "raise"])
def test_patched_restores_what_was_patched_before(inside):
    model = fastbert.patch(make(), residual_norm=False)
    types, report = classes(model), str(fastbert.report(model))
    try:
        with fastbert.patched(model, intermediate=False):
            assert classes(model) != types
            if inside == "unpatch":
                fastbert.unpatch(model)
            elif inside == "patch otherwise":
                fastbert.patch(model, mlm_head=False)
            elif inside == "raise":
                raise ValueError
    except ValueError:
        pass
    assert classes(model) == types
    assert str(fastbert.report(model)) == report


def test_patched_within_patched():
    model = make()
    types = classes(model)
    with fastbert.patched(model, intermediate=False):
        outer = classes(model)
        with fastbert.patched(model):
            assert classes(model) != outer
        assert classes(model) == outer
    assert classes(model) == types


def test_patched_with_a_wrong_keyword_changes_nothing():
    model = make()
    types = classes(model)
    with pytest.raises(TypeError), fastbert.patched(model, attention="no"):
        pytest.fail("the block was entered")
    assert classes(model) == types


def test_a_module_that_was_replaced_meanwhile_stays_replaced():
    model = make()
    types = classes(model)
    mine = nn.Identity()
    with fastbert.patched(model):
        model.dropout = mine
        replaced = model.bert.encoder.layer[0].intermediate = bert.BertIntermediate(model.config)
    assert model.dropout is mine and model.bert.encoder.layer[0].intermediate is replaced
    assert classes(model) == types | {"dropout": nn.Identity}
