"""Caches the structure of a BertLayer and checks in a few microseconds per call that it is unchanged.

The layer op does the work of all modules inside the layer, so the next call must notice any change: a hook, a replaced
module, class or forward. The structure (children, types, hooks, forwards, forms of parameters) is compared, not trusted.

A model checks all of its layers in one loop before the first one runs, because the same few lines twelve times in a row are
much cheaper than between launches. If code other than kernels runs between layers (a hook on one, such as FSDP's, or a layer
that runs module by module), each layer checks itself when it is called, as that code may have changed it. So does a layer
that gradient checkpointing calls again. tests/models/layer_changes.py lists the ways to change a layer, and test_layer.py
makes each change after a plain call; add a new way there.

The state is an attribute of the layer, unlike the tallies of `fastbert.dispatch`: it refers to modules whose attributes may
lead back to the layer, and a global dictionary would keep the model alive forever. On the layer, Python's garbage collector
sees the cycle. Copies and pickles leave it out, and `unpatch` removes it.
"""

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import ops
from fastbert.dispatch import HOOK_KINDS, hooked, is_plain, is_plain_tensor
from fastbert.kernels.core.tensor_forms import Forms
from fastbert.layers import attention, intermediate, residual_norm, stock
from fastbert.layers.layout import Layout, layout_of
from fastbert.layers.parts import activation_reason, dropout_reason, kernel_activation, layernorm_reason

_UNSUPPORTED = {
    "SelfAttention": attention.unsupported,
    "SelfOutput": residual_norm.unsupported,
    "Intermediate": intermediate.unsupported,
    "Output": residual_norm.unsupported,
    "FFN": lambda module: activation_reason(module.activation) or dropout_reason(module.dropout),
}
_NO_DROPOUT = {"p": 0.0, "training": False}


class LayerState:
    """The structure of a layer. `reason` is why the layer op may not replace its modules, or None.

    It is valid while `is_current(layer)` is true.
    """

    def __init__(self, layer: nn.Module) -> None:
        inside = {name: module for name, module in layer.named_modules() if name}
        modules = list(inside.values())
        self._parts = dict(layer._modules)
        self._children = [(vars(module), dict(module._modules)) for module in modules if module._modules]
        self._modules, self._types = modules, list(map(type, modules))
        self._classes = [cls for cls in dict.fromkeys(self._types) if hasattr(cls, "forward")]  # TorchScript modules have none
        self._forwards = list(map(_FORWARD, self._classes))
        self.layer = ref(layer)
        self._dicts = [vars(module) for module in modules]
        self._known_hooks = list(map(dict, self._hooks()))
        self._known_own_forwards = self._own_forwards()
        self.global_state = global_state(layer)
        self._inside = inside
        self._layout = layout_of(layer.PART.family)
        self.reason = self.global_state[0] or _reason(inside, self._layout)
        if self.reason is None:
            self._read(inside, self._layout)

    def _read(self, inside: dict[str, nn.Module], layout: Layout) -> None:
        order = (*layout.linears[:4], layout.norms[0], *layout.linears[4:], layout.norms[1])  # as ops.Weights has them
        self._with_parameters = [vars(inside[name]) for name in order]
        self._forms: tuple[Forms, str | None] | None = None
        self._addresses: list[int] | None = None
        self.attention = vars(inside[layout.attention])
        self._dropouts = [_NO_DROPOUT if name is None else vars(inside[name]) for name in layout.dropouts]
        self._norms = [vars(inside[name]) for name in layout.norms]
        owner, self._activation_name = layout.activation
        self._activation_owner = vars(inside[owner])
        # None for the layer itself: its own attributes, among which this state is, would make a cycle.
        self.chunks, self.chunk = vars(inside[layout.chunks[0]]) if layout.chunks[0] else None, layout.chunks[1]
        activation = getattr(inside[owner], self._activation_name)
        self._activation_vars = vars(activation) if isinstance(activation, nn.Module) else {}
        self._activation = self._activation_key()
        self.activation = kernel_activation(activation)

    def is_current(self, layer: nn.Module) -> bool:
        """Whether the structure of `layer` is unchanged; a call reads parameters, numbers and training modes itself."""
        return (
            layer._modules == self._parts
            and all([own["_modules"] == known for own, known in self._children])
            and list(map(type, self._modules)) == self._types
            and all(map(is_, map(vars, self._modules), self._dicts))
            and list(map(_FORWARD, self._classes)) == self._forwards
            and self._hooks() == self._known_hooks
            and self._own_forwards() == self._known_own_forwards
            and (
                self._activation_key() == self._activation
                if self.reason is None
                else (self.global_state[0] or _reason(self._inside, self._layout)) == self.reason
            )
        )

    @property
    def config(self) -> Any:
        return self.attention["config"]

    def _hooks(self) -> list[dict[int, Any]]:
        """All hook dictionaries that are not empty, looked up anew: hooks are often removed by replacing the dictionary."""
        return list(filter(None, chain.from_iterable(map(_HOOKS, self._dicts))))

    def _activation_key(self) -> tuple[Any, ...]:
        return (
            self._activation_owner.get(self._activation_name),
            self._activation_vars.get("approximate"),
            self._activation_vars.get("act"),
        )

    def _own_forwards(self) -> list[Any]:
        return [own["forward"] for own in self._dicts if "forward" in own]

    def weights(self) -> Any:
        """The current parameters (ops.Weights), or why the op does not take them."""
        try:
            found = [tensor for own in self._with_parameters for tensor in _BOTH(own["_parameters"])]
        except KeyError:  # FSDP 1 puts views of its flat parameter in their place, as attributes
            both = ((own, name) for own in self._with_parameters for name in ("weight", "bias"))
            found = [own["_parameters"].get(name, own.get(name)) for own, name in both]
        fit = self._forms
        if fit is None or not fit[0].same(found):
            if not all(tensor is not None and is_plain_tensor(tensor) for tensor in found):
                return "a parameter that is not a plain tensor"
            self._forms = fit = Forms(found), _weights_reason(ops.Weights._make(found))
        if fit[1] is not None:
            return fit[1]
        addresses = list(map(Tensor.data_ptr, found))
        if addresses != self._addresses:
            if any(address % ops.ALIGNMENT for address in addresses):
                return f"a parameter that is not aligned to {ops.ALIGNMENT} bytes"
            self._addresses = addresses
        return ops.Weights._make(found)

    def settings(self, hidden: int) -> Any:
        """The current numbers (ops.Settings), or why the op does not take them."""
        attention, (scores, attended, output), (first, second) = self.attention, self._dropouts, self._norms
        head_size, scale = attention["attention_head_size"], attention.get("scaling")
        if type(scale) is not float:
            return "scaling is not a float"
        if hidden % head_size or head_size > ops.MAX_HEAD_SIZE:
            return f"head size {head_size}, hidden size {hidden}"
        ps = (
            scores["p"] if attention["training"] else 0.0,
            attended["p"] if attended["training"] else 0.0,
            output["p"] if output["training"] else 0.0,
        )
        if not all([0.0 <= p <= 1.0 for p in ps]):
            return "a dropout probability outside [0, 1]"
        return ops.Settings(
            hidden // head_size,
            self.activation,
            first["eps"],
            second["eps"],
            *ps,
            attention["is_causal"],
            scale,
        )


class CallContext(NamedTuple):
    """What all layers share in one call of their model.

    global_state: the result of `global_state`, of the model.
    hidden: the hidden size.
    device: the device of the hidden states.
    product_dtype: the dtype in which autocast runs matrix products, or None.
    """

    global_state: tuple[str | None, bool]
    hidden: int
    device: torch.device
    product_dtype: torch.dtype | None


class PreparedLayer(NamedTuple):
    """The current state of a layer; its call computes the fields that are None itself."""

    state: LayerState
    weights: Any = None
    settings: Any = None
    context: CallContext | None = None


def prepare(layer: nn.Module, context: CallContext, hooked: bool) -> PreparedLayer:
    """Prepare the next call of `layer`: its state and, if the op takes them, its weights and settings.

    Hooks on the layer, such as FSDP's, may change its parameters before it runs, so a `hooked` layer reads them in its call.
    """
    known = state_of(layer, context.global_state)
    if hooked or known.reason is not None:
        return PreparedLayer(known)
    weights, settings = known.weights(), known.settings(context.hidden)
    if isinstance(weights, str) or isinstance(settings, str) or weights.query.device != context.device:
        return PreparedLayer(known)
    return PreparedLayer(known, weights, settings, context)


_ATTRIBUTE = "_fastbert_state"


def global_state(module: nn.Module) -> tuple[str | None, bool]:
    """Why the stock code of layers of the family of `module`, which has a fast class, is untested, or None; and whether torch
    has a global module hook."""
    return stock.untested(module.PART.family.name("Layer")), bool(_has_any_global_hook())


def state_of(layer: nn.Module, shared: tuple[str | None, bool] | None = None) -> LayerState:
    """The current state of `layer`; `shared` is the result of global_state(layer) if it was just computed."""
    known = vars(layer).get(_ATTRIBUTE)
    if (
        known is None
        or known.layer() is not layer
        or known.global_state != (shared or global_state(layer))
        or not known.is_current(layer)
    ):
        known = vars(layer)[_ATTRIBUTE] = LayerState(layer)
    return known


def without_state(own: dict[str, Any]) -> dict[str, Any]:
    """A copy of a layer's `vars()` without the state."""
    return {name: value for name, value in own.items() if name != _ATTRIBUTE}


def clear(layer: nn.Module) -> None:
    """Remove the state from `layer`."""
    vars(layer).pop(_ATTRIBUTE, None)


_FORWARD = attrgetter("forward")
_HOOKS = itemgetter(*HOOK_KINDS)
_BOTH = itemgetter("weight", "bias")


def _reason(inside: dict[str, nn.Module], layout: Layout) -> str | None:
    for name, (part, fast) in layout.parts.items():
        module = inside.get(name)
        found = stock.part_of(type(module))
        if (found.part, found.fast) != (part, fast):
            return _part_reason(name, module, part)
        if hooked(module):
            return f"{name} has hooks, or a replaced forward"
    for name in layout.linears:
        linear = inside.get(name)
        if not is_plain(linear, nn.Linear):
            return f"{name} is a {type(linear).__name__}, or has hooks"
        if linear.bias is None:
            return f"{name} has no bias"
    for name in layout.norms:
        if name not in inside:
            return f"{name} is missing, or is shared with another module"
    for name in filter(None, layout.dropouts):
        dropout = inside.get(name)
        if dropout is None or "p" not in vars(dropout):
            return f"{name} is a {type(dropout).__name__}"
    parts = ((name, _UNSUPPORTED[part](inside[name])) for name, (part, _) in layout.parts.items() if part in _UNSUPPORTED)
    norms = ((name, layernorm_reason(inside[name])) for name in layout.norms)
    return next((f"{name}: {why}" for name, why in (*parts, *norms) if why), None)


def _part_reason(name: str, module: nn.Module | None, part: str) -> str:
    """Why a module does not have the class that the layer op needs."""
    if part in _UNSUPPORTED and stock.part_of(type(module)).part == part:
        return f"{name}: {_UNSUPPORTED[part](module) or 'not patched'}"
    return f"{name} is a {type(module).__name__}"


def _weights_reason(weights: Any) -> str | None:
    """Why the op does not take these weights, or None."""
    first = weights.query
    inner, hidden = weights.intermediate.shape[0], first.shape[-1]
    matrices = {"intermediate": (inner, hidden), "output": (hidden, inner), "intermediate_bias": (inner,)}
    for name, tensor in zip(ops.Weights._fields, weights, strict=True):
        square = name in ("query", "key", "value", "attention_output")
        if tuple(tensor.shape) != matrices.get(name, (hidden, hidden) if square else (hidden,)):
            return f"an unexpected shape: {name} is {tuple(tensor.shape)}"
        if tensor.dtype != first.dtype or tensor.device != first.device:
            return f"parameters of {first.dtype} on {first.device} and {tensor.dtype} on {tensor.device}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None
