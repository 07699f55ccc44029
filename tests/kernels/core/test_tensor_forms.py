"""Forms of tensors: every difference is noticed, with torch's guards and without them."""

import pytest
import torch

from fastbert.kernels.core import tensor_forms
from fastbert.kernels.core.tensor_forms import Forms
from fastbert.testing.rows import DEVICE

pytestmark = pytest.mark.no_launch


@pytest.fixture(params=["guards", "python"])
def way(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(tensor_forms, "_proven", lambda: None)
    return request.param


def make():
    return [torch.zeros(shape, device=DEVICE, dtype=dtype) for shape, dtype in (((4, 6), torch.float32), ((), torch.float16))]


def known(tensors, way):
    """Forms that have compared the tensors twice, after which they have torch's guards."""
    forms = Forms(tensors)
    assert forms.same(tensors)
    assert (forms._guards is not None) == (way == "guards")
    return forms


OTHERS = {
    "dtype of the same size": lambda x: x.to(torch.int32),
    "dtype": lambda x: x.half(),
    "strides": lambda x: x.t().contiguous().t(),
    "shape": lambda x: x[:3],
    "dimensions": lambda x: x.reshape(24),
    "type": torch.nn.Parameter,
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
    "subclass": lambda x: x.as_subclass(type("Other", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_differs_is_noticed(change, way):
    tensors = make()
    forms = known(tensors, way)
    assert not forms.same([change(tensors[0]), tensors[1]])
    assert forms.same(tensors) and forms.same(make())


def test_a_tensor_changed_in_place(way):
    tensors = make()
    forms = known(tensors, way)
    tensors[0].data = tensors[0].half()
    assert not forms.same(tensors)


def test_fewer_more_or_none(way):
    tensors = make()
    forms = known(tensors, way)
    assert not forms.same(tensors[:1]) and not forms.same([*tensors, tensors[0]]) and not forms.same(tensors[::-1])


def test_what_does_not_matter(way):
    tensors = make()
    forms = known(tensors, way)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert forms.same(tensors)
    tensors[0].requires_grad_()
    assert forms.same(tensors)


def test_a_tensor_that_comes_twice(way):
    """torch's guards refuse such a list."""
    (tensor, _) = make()
    forms = Forms([tensor, tensor])
    assert forms.same([tensor, tensor]) and forms._guards is None


def test_guards_are_not_made_for_ever():
    """Making them takes as long as ten comparisons."""
    tensors = make()
    forms = Forms(tensors)
    for i in range(40):
        tensors[0].requires_grad_(i % 2 == 0)
        assert forms.same(tensors)
    assert forms._guards is None


def test_this_release_has_guards():
    """Without them results are right but slower: a release that changed them needs a look."""
    assert tensor_forms._proven() is not None


def test_a_release_whose_guards_miss_something(monkeypatch):
    kind = tensor_forms._proven()

    class Blind:
        def __init__(self, *tensors, dynamic_dims_sizes, dynamic_dims_strides):
            unknown = [[None] * len(sizes) for sizes in dynamic_dims_sizes]
            self.check = kind(*tensors, dynamic_dims_sizes=dynamic_dims_sizes, dynamic_dims_strides=unknown).check

    assert tensor_forms._notices(kind) and not tensor_forms._notices(Blind)
    tensor_forms._proven.cache_clear()
    monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", Blind)
    assert tensor_forms._proven() is None
    tensor_forms._proven.cache_clear()
