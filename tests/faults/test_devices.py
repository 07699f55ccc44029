"""A tensor on a different device than the others: one error that names it, and no kernel that reads its address.

The other device is "meta", which needs no hardware; its addresses are invalid everywhere.
"""

import copy

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.kernels.adamw import adamw
from fastbert.kernels.adamw.tables import Hyperparameters, Parameter
from fastbert.testing.models import counting
from fastbert.testing.rows import DEVICE, seed_tensor
from tests.models.tiny import BASE, MLM, make, make_batch

from .cases import NAMES, WITH_DROPOUT, cases


def others_of(name):
    """The tensor arguments of a case except the first, which defines the device."""
    case = cases()[name]
    arguments = [*list(case.inputs)[1:], *(key for key, value in case.options.items() if isinstance(value, Tensor))]
    return [*arguments, *(["seed"] if name in WITH_DROPOUT else [])]


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in NAMES for argument in others_of(name)])
def test_an_op_names_the_argument(name, argument, launches):
    case = cases()[name]
    arguments = {**case.inputs, **case.options} | ({"p": 0.5, "seed": seed_tensor(1)} if argument == "seed" else {})
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*{DEVICE.type}.*, got .*meta"):
        case.call(**arguments)
    assert not launches()


@pytest.mark.parametrize("name", ["grad", "exp_avg", "exp_avg_sq", "step"])
def test_the_optimizers_op_too(name, launches):
    param = torch.zeros(3, device=DEVICE)
    tensors = {"grad": param.clone(), "exp_avg": param.clone(), "exp_avg_sq": param.clone(), "step": param[0].clone()}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on {DEVICE.type}.*, got one on meta"):
        adamw([Parameter(param, **tensors)], [Hyperparameters()])
    assert not launches()


def outcome(model, batch):
    """The outcome of a call: the type of its error, or the device of its result."""
    try:
        return model(**batch)[0].device
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return type(error)


PARTS = (
    "embeddings.word_embeddings",
    "embeddings.LayerNorm",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.output.LayerNorm",
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.1.output.dense",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_model_elsewhere_is_as_stock(part):
    model = make(BASE)
    model.get_submodule(part).to("meta")
    patched, batch = fastbert.patch(copy.deepcopy(model)), make_batch(BASE)
    expected = outcome(model, batch)
    found = outcome(patched, batch)
    errors = (RuntimeError, ValueError, NotImplementedError)
    assert found == expected or (found in errors and expected in errors), (found, expected)


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "attention_mask", "labels"])
def test_an_input_elsewhere_is_as_stock(name):
    """Both raise an error, or both return a meta tensor."""
    model, batch = make(MLM), make_batch(MLM)
    patched = fastbert.patch(copy.deepcopy(model)).train()
    batch[name] = batch[name].to("meta")
    expected = outcome(model.train(), batch)
    with counting(heads=True) as launched:
        found = outcome(patched, batch)
    errors = (RuntimeError, ValueError, NotImplementedError)
    assert found == expected or (found in errors and expected in errors), (found, expected)
    assert name in ("attention_mask", "labels") or not launched["embedding_layernorm_fwd_kernel"]
