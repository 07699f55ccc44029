"""Changes that no parameter, buffer or registered module shows, for tests/graphs/test_staleness.py.

Each is an activation for a pooler, and a function of the model that changes what it computes.
"""

from types import SimpleNamespace

import torch
from torch import nn


class Activation(nn.Module):
    """Computes function(self, x) with the attributes it is given; modules among them are not registered."""

    def __init__(self, function, **attributes):
        super().__init__()
        vars(self).update(attributes, function=function)
        self.eval()

    def forward(self, x):
        return self.function(self, x)


def linear():
    return nn.Linear(40, 40).eval()


def replace_weight(layer):
    layer.weight = nn.Parameter(torch.zeros(40, 40))


def by_class(**members):
    """An activation of a class of its own."""

    class Own(nn.Tanh):
        pass

    for name, value in members.items():
        setattr(Own, name, value)
    return Own().eval()


def forward_on_a_linear(factor):
    def change(model):
        dense = model.pooler.dense
        dense.forward = lambda x: factor * nn.Linear.forward(dense, x)

    return change


def in_class(name, value):
    return lambda model: setattr(type(model.pooler.activation), name, value)


def of(model, name):
    return getattr(model.pooler.activation, name)


CHANGES = {
    "class gains a forward": (by_class, in_class("forward", lambda self, x: 2 * x)),
    "method": (
        lambda: by_class(forward=lambda self, x: self.method(x), method=lambda self, x: x.tanh()),
        in_class("method", lambda self, x: 2 * x),
    ),
    "class attribute": (lambda: by_class(forward=lambda self, x: self.factor * x, factor=2.0), in_class("factor", 3.0)),
    "first module of an empty container": (
        lambda: nn.Sequential().eval(),
        lambda model: model.pooler.activation.append(nn.ReLU().eval()),
    ),
    "weight in a list": (
        lambda: Activation(lambda self, x: self.layers[0](x), layers=[linear()]),
        lambda model: replace_weight(of(model, "layers")[0]),
    ),
    "weight in a tuple of a dictionary": (
        lambda: Activation(lambda self, x: self.layers["a"][0](x), layers={"a": (linear(),)}),
        lambda model: replace_weight(of(model, "layers")["a"][0]),
    ),
    "weight behind a bound method": (
        lambda: Activation(lambda self, x: self.call(x), call=linear().forward),
        lambda model: replace_weight(of(model, "call").__self__),
    ),
    "memory of a tensor": (
        lambda: Activation(lambda self, x: self.scale * x, scale=torch.tensor(2.0)),
        lambda model: setattr(of(model, "scale"), "data", torch.tensor(5.0)),
    ),
    "tensor on the host": (  # a graph receives its number
        lambda: Activation(lambda self, x: self.scale.item() * x, scale=torch.tensor(2.0)),
        lambda model: of(model, "scale").fill_(5.0),
    ),
    "attribute of an object": (
        lambda: Activation(lambda self, x: self.options.scale[0] * x, options=SimpleNamespace(scale=[2.0])),
        lambda model: of(model, "options").scale.__setitem__(0, 3.0),
    ),
    "list in a tuple": (
        lambda: Activation(lambda self, x: self.scales[0][0] * x, scales=([2.0],)),
        lambda model: of(model, "scales")[0].__setitem__(0, 3.0),
    ),
    "object in the config": (
        lambda: Activation(lambda self, x: self.config.nested["scale"] * x, config=SimpleNamespace(nested={"scale": 2.0})),
        lambda model: of(model, "config").nested.__setitem__("scale", 3.0),
    ),
}
