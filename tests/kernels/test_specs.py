"""The specs in fastbert/testing/specs: their inputs, calls and variants are consistent."""

from collections import Counter
from dataclasses import fields, replace
from inspect import signature

import pytest
import torch

from fastbert.kernels.core.configs import TABLES
from fastbert.testing.checking import check
from fastbert.testing.rows import BIAS_GELU
from fastbert.testing.spec import Draw, Size
from fastbert.testing.specs import SPECS

EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=str)
# adamw's reference is no more accurate than its kernel (its own tests use float64), and some of a layer's gradients are only
# rounding after cancellation.
COMPARED = [spec for name, spec in SPECS.items() if name not in ("adamw", "encoder_layer")]


@pytest.mark.parametrize("spec, form", [(spec, form) for spec in COMPARED for form in spec.forms], ids=str)
def test_the_op_computes_what_its_reference_does(spec, form):
    check(spec, spec.small, torch.float32, **spec.forms[form])


def test_a_wrong_op_is_noticed():
    wrong = replace(BIAS_GELU, call=lambda **inputs: 1.001 * BIAS_GELU.call(**inputs))
    with pytest.raises(AssertionError, match="y: error"):
        check(wrong, wrong.small, torch.float32)
    wrong = replace(SPECS["key_bounds"], call=lambda key_mask: SPECS["key_bounds"].call(~key_mask))
    with pytest.raises(AssertionError, match="y"):
        check(wrong, wrong.small, torch.float32)


@pytest.mark.no_launch
@EVERY_SPEC
def test_variants(spec):
    """Each variant once, with a label of its own; those of the short list are among them."""
    variants = list(spec.variants())
    names = Counter(variant.name for variant in variants)
    assert max(names.values()) == 1
    assert spec.short and {f"{spec.name} {form}" for form in spec.short} <= names.keys()
    assert all(variant.op == spec.name and variant.dtypes for variant in variants)
    labels = {(variant.label, *sorted(map(str, variant.options.items())), *variant.kernels) for variant in variants}
    assert len(labels) == len({variant.label for variant in variants})


@pytest.mark.no_launch
@EVERY_SPEC
def test_what_it_names_is_there(spec):
    assert spec.tables.keys() <= spec.forms.keys()
    assert {name for tables in spec.tables.values() for name in tables} <= TABLES.keys()
    assert spec.width in {field.name for field in fields(Size)}
    if spec.eager:
        taken = signature(spec.eager).parameters.keys()
        given = spec.inputs(spec.small, Draw("meta"), torch.float32)
        assert {*given.leaves, *given.context} <= taken and ("p" in taken) == spec.dropout
