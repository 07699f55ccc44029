"""Under autocast a layer hands the next its result in the products' dtype too, as long as that is still valid."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.kernels.encoder_layer import Settings, Twins, unchecked
from fastbert.kernels.encoder_layer.settings import Layout, Weights
from fastbert.testing.encoder_layer import NAMES, make_inputs, normal, seeds

HALF = torch.float16
DROPPED = Settings(3, attention_p=0.1, attention_output_p=0.1, output_p=0.1)


def stack(x, weights, twins, between=lambda y: y, products=(HALF, HALF)):
    """Two layers, one after the other."""
    for product_dtype in products:
        layout = Layout(key_mask=None)
        x = unchecked(between(x), weights, DROPPED, layout, product_dtype, torch.float32, seeds(), twins)
    return x


@pytest.fixture
def weights():
    inputs = make_inputs((2, 5, 24))
    return Weights(*(inputs[name].requires_grad_() for name in NAMES))


def results(weights, twins, **options):
    torch.manual_seed(3)
    x = normal(2, 5, 24).requires_grad_()
    y = stack(x, weights, twins, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *weights])]


def same(a, b):
    return all(map(torch.equal, a, b))


class Casts(TorchDispatchMode):
    """Counts casts of hidden states."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._to_copy.default and args[0].shape[-1] == 24
        return function(*args, **(kwargs or {}))


def casts(twins, weights):
    with Casts() as found:
        forward(weights, twins)
    return found.n


def forward(weights, twins, **options):
    with torch.no_grad():
        return stack(normal(2, 5, 24), weights, twins, **options)


def test_it_changes_no_bit(weights):
    assert same(results(weights, Twins()), results(weights, None))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_nor_without_a_gradient(weights, inference):
    x = normal(2, 5, 24)
    with inference():
        assert torch.equal(stack(x, weights, Twins()), stack(x, weights, None))


def test_the_second_layer_casts_nothing(weights):
    assert casts(None, weights) - casts(Twins(), weights) == 1


@pytest.mark.parametrize("change", ["written to", "another", "a view", "of another product"])
def test_a_twin_of_something_else_is_not_taken(weights, change):
    """A hook may write to a result or replace it, and layers may compute in different dtypes."""
    changes = {"written to": lambda y: y.mul_(2), "another": lambda y: y + 1, "a view": lambda y: y[:]}
    options = {"between": changes[change]} if change in changes else {"products": (HALF, torch.float32)}
    x = normal(2, 5, 24)
    with torch.no_grad():
        assert torch.equal(stack(x.clone(), weights, Twins(), **options), stack(x.clone(), weights, None, **options))


def test_it_is_kept_no_longer_than_needed(weights):
    twins = Twins()
    y = forward(weights, twins)
    assert twins.take(y, torch.bfloat16) is None, "of another dtype"
    assert twins.low is None and twins.take(y, HALF) is None
    forward(weights, twins)
    assert twins.low is not None
    twins.clear()
    assert twins.low is None
