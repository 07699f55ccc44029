"""Changes to a BertLayer after it was called, for tests/models/test_layer.py.

A change takes a layer and returns a function that undoes it.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize


def changed(name, attribute, value):
    """Change an attribute of the module `name` to `value(old)`."""

    def change(layer):
        module = layer.get_submodule(name)
        before = getattr(module, attribute)
        setattr(module, attribute, value(before))
        return functools.partial(setattr, module, attribute, before)

    return change


def replaced(name, new):
    """Replace the module `name` by `new(module)`."""
    parent, _, attribute = name.rpartition(".")
    return changed(parent, attribute, new)


def parameter(name, value):
    parent, _, attribute = name.rpartition(".")
    return changed(parent, attribute, lambda before: nn.Parameter(value(before.detach())))


def data(name, value):
    """Give a parameter other memory, `value(old)`, through `.data`."""

    def change(layer):
        tensor = layer.get_parameter(name)
        before = tensor.data
        tensor.data = value(before)
        return functools.partial(setattr, tensor, "data", before)

    return change


def anew(name, registry, child, value):
    """Put a child, a module or a parameter, in a new registry, as engines that move parameters do."""

    def change(layer):
        module = layer.get_submodule(name)
        before = getattr(module, registry)
        setattr(module, registry, {**before, child: value(before[child])})
        return functools.partial(setattr, module, registry, before)

    return change


def another_dict(layer):
    """Replace the whole `__dict__` of a module in the layer."""
    linear = layer.output.dense
    before = vars(linear)
    linear.__dict__ = {**before, "_parameters": {**before["_parameters"], "weight": nn.Parameter(2 * linear.weight.detach())}}
    return lambda: setattr(linear, "__dict__", before)


def together(*changes):
    def change(layer):
        undo = [each(layer) for each in changes]
        return lambda: [each() for each in undo]

    return change


def own_forward(name, of_class=False):
    """Set a forward on a module or on its class that doubles the output, or the first output of attention."""

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
        layer.requires_grad_()  # peft replaced it

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
    """A feed-forward with 24 columns instead of 56."""

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
    """Write to a parameter in place, as swapping in averaged weights does: its address stays."""
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
    """A Tensor subclass, as DTensor is."""


def scaled_copy(module):
    made = copy.deepcopy(module)
    made.weight.data.mul_(1.5)
    return made


def by_a_callable(name):
    """A submodule replaced by a function that calls it."""

    def change(layer):
        parent = layer.get_submodule(name.rpartition(".")[0])
        attribute = name.rpartition(".")[2]
        module = parent._modules.pop(attribute)
        setattr(parent, attribute, lambda *args, **kwargs: module(*args, **kwargs))

        def undo():
            delattr(parent, attribute)
            setattr(parent, attribute, module)

        return undo

    return change


class Unhashable:
    def __eq__(self, other):
        return self is other

    def __call__(self, x):
        return x.relu()


def unhashable_activation(layer):
    part = layer.intermediate
    module = part._modules.pop("intermediate_act_fn")
    part.intermediate_act_fn = Unhashable()

    def undo():
        del part.intermediate_act_fn
        part.intermediate_act_fn = module

    return undo


def one_norm(layer):
    before, layer.output.LayerNorm = layer.output.LayerNorm, layer.attention.output.LayerNorm
    return functools.partial(setattr, layer.output, "LayerNorm", before)


# Changes with which the op still runs, on the new numbers.
SUPPORTED = {
    "another Linear": replaced("attention.output.dense", scaled_copy),
    "another LayerNorm": replaced("output.LayerNorm", scaled_copy),
    "another dropout": replaced("output.dropout", lambda _: nn.Dropout(0.0)),
    "another part": replaced("intermediate", copy.deepcopy),
    "new parameter": parameter("attention.self.key.weight", lambda w: 1.5 * w),
    "new bias": parameter("output.LayerNorm.bias", lambda b: b + 0.5),
    "parameters in a new dict": anew("output.dense", "_parameters", "weight", lambda w: nn.Parameter(1.5 * w.detach())),
    "a new dict": another_dict,
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
# Changes with which the layer falls back, and part of the reason.
UNSUPPORTED = {
    "subclass of Linear": (replaced("attention.self.value", doubling), "Doubling"),
    "LoRA": (lora, "attention.self.query is a Linear"),
    "Identity for LayerNorm": (replaced("attention.output.LayerNorm", lambda _: nn.Identity()), "Identity"),
    "Identity for dropout": (replaced("output.dropout", lambda _: nn.Identity()), "Identity"),
    "Identity for a product": (replaced("attention.output.dense", lambda _: nn.Identity()), "Identity"),
    "own forward of a part": (own_forward("intermediate"), "intermediate has"),
    "own forward of a Linear": (own_forward("output.dense"), "output.dense"),
    "own forward of LayerNorm": (own_forward("attention.output.LayerNorm"), "LayerNorm"),
    "own chunk": (chunk_of_its_own, "or replaced feed"),
    "transposed": (data("attention.self.query.weight", torch.t), "query is not contiguous"),
    "strided": (data("output.dense.weight", strided), "output is not contiguous"),
    "unaligned matrix": (data("intermediate.dense.weight", unaligned), "not aligned to 16 bytes"),
    "unaligned vector": (data("output.LayerNorm.weight", unaligned), "not aligned to 16 bytes"),
    "narrower by a view": (narrowed(view=True), "output is not contiguous"),
    "orthogonal": (parametrized("attention.self.query", parametrizations.orthogonal), "ParametrizedLinear"),
    "weight norm": (parametrized("intermediate.dense", parametrizations.weight_norm), "ParametrizedLinear"),
    "no bias": (changed("output.dense", "bias", lambda _: None), "not a plain tensor"),
    "LayerNorm without bias": (changed("output.LayerNorm", "bias", lambda _: None), "not a plain tensor"),
    "scaling by a tensor": (changed("attention.self", "scaling", lambda s: torch.tensor(2.0 * s)), "scaling"),
    "mish": (replaced("intermediate.intermediate_act_fn", lambda _: nn.Mish()), "activation Mish"),
    "one LayerNorm twice": (one_norm, "is shared with"),
    "activation in TorchScript": (replaced("intermediate.intermediate_act_fn", torch.jit.script), "RecursiveScriptModule"),
    "LayerNorm in TorchScript": (replaced("output.LayerNorm", torch.jit.script), "RecursiveScriptModule"),
    "unhashable activation": (unhashable_activation, "Unhashable"),
    "GELUActivation's function": (changed("intermediate.intermediate_act_fn", "act", lambda _: F.silu), "replaced function"),
    "intermediate by a callable": (by_a_callable("intermediate"), "intermediate is a NoneType"),
    "chunks": (changed("", "chunk_size_feed_forward", lambda _: 3), "chunked"),
}
# Changes with which every layer of the process falls back.
UNSUPPORTED_IN_ALL = {
    "Linear": (own_forward("output.dense", of_class=True), "Linear"),
    "Dropout": (own_forward("output.dropout", of_class=True), "dropout"),
    "activation": (own_forward("intermediate.intermediate_act_fn", of_class=True), "activation"),
    "BertSelfAttention": (own_forward("attention.self", of_class=True), "BertSelfAttention.forward"),
    "BertIntermediate": (own_forward("intermediate", of_class=True), "BertIntermediate.forward"),
    "BertOutput": (own_forward("output", of_class=True), "BertOutput.forward"),
    "BertAttention": (own_forward("attention", of_class=True), "BertAttention.forward"),
    "BertLayer": (own_forward("", of_class=True), "BertLayer.forward"),
}
# Changes in one layer with which all layers get stock's masks.
UNSUPPORTED_WITH_MASKS = {
    "own forward": (own_forward("attention"), "attention has"),
    "own forward below": (own_forward("attention.self"), "attention.self has"),
    "attention by a callable": (by_a_callable("attention"), "attention is a NoneType"),
    "self-attention by a callable": (by_a_callable("attention.self"), "attention.self is a NoneType"),
}
# Changes in one layer whose result the next layer does not take either.
UNSUPPORTED_ONWARDS = {
    "subclass of Tensor": (parameter("output.dense.weight", lambda w: w.as_subclass(Subclass)), "not a plain tensor"),
}
CHANGES = (
    {f"supported: {name}": (change, None) for name, change in SUPPORTED.items()}
    | {f"unsupported: {name}": change for name, change in UNSUPPORTED.items()}
    | {f"in all: {name}": change for name, change in UNSUPPORTED_IN_ALL.items()}
    | {f"masks: {name}": change for name, change in UNSUPPORTED_WITH_MASKS.items()}
    | {f"onwards: {name}": change for name, change in UNSUPPORTED_ONWARDS.items()}
)
