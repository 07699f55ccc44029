"""Notices whatever changes in a model between the capture of a graph and its replay.

A graph repeats what its capture did: it reads parameters at their addresses and knows nothing of modules. New values at the
same addresses it sees. Anything else (another parameter, address or dtype, a module, an attribute, a hook, train mode) would be
ignored, so the next call must notice it. Everything is compared, by identity, in a few C calls over the whole model.

Beside what modules register, this covers what their attributes hold (modules in plain lists, tensors, objects of the user's),
attributes of their classes, functions of transformers, and its registries of attention functions. It covers no global variable
of the user's own code, and no more than the attributes of an object and the containers among them.
"""

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import call, is_, itemgetter
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastbert.dispatch import IDLE_HOOKS, forward_replaced, is_plain_tensor
from fastbert.integrations.attention import implementation_reason
from fastbert.kernels.core.tensor_forms import Forms
from fastbert.layers.family import FAMILIES

_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients those of the backward do nothing
_HOOKS = itemgetter(*_HOOK_KINDS)
_TENSORS = ("_parameters", "_buffers")


class ModelState:
    """The modules, parameters, buffers, attributes, hooks and classes of `model` at one moment.

    Hooks on the model itself do not count: they run around each call, replayed or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = _modules(model)
        self._dicts = [vars(module) for module in self._modules]
        self._types = list(map(type, self._modules))
        lineages = chain.from_iterable(cls.__mro__ for cls in dict.fromkeys(self._types))
        classes = [cls for cls in dict.fromkeys(lineages) if "forward" in vars(cls) or not _is_of_a_library(cls)]
        libraries = [sys.modules.get(name) for name in dict.fromkeys(cls.__module__ for cls in classes)]
        libraries = [module for module in libraries if module is not None and module.__name__.startswith("transformers.")]
        self._namespaces = [MappingProxyType(vars(module)) for module in libraries] + list(map(vars, classes))
        self._members = self._all_members()
        inside = self._dicts[1:]
        self._packing = [vars(module) for module in self._modules if hasattr(type(module), _TRANSIENT)]
        self._names = list(map(_names, self._packing))
        self._sized = [own for own in self._dicts if all(own is not other for other in self._packing)]
        self._sizes = list(map(len, self._sized))
        self._getters = [itemgetter(*_relevant(module)) for module in self._modules]
        self._values = list(map(call, self._getters, self._dicts))
        self._configs = list({id(own["config"]): own["config"] for own in self._dicts if "config" in own}.values())
        self._known_configs = list(map(_copied, map(vars, self._configs)))
        # Lists and dictionaries among them, such as a LoRA layer's merged adapters, may change in place.
        attributes = list(chain.from_iterable(map(_attributes, self._dicts)))
        self._containers = [x for x in attributes if _is_container(x)] + _registries()
        leaves = list(_leaves((*attributes, *map(vars, self._configs))))
        self._containers += [vars(x) for x in {id(x): x for x in leaves if _is_object(x)}.values()]
        self._contents = list(map(_copied, self._containers))
        # Those on the host reach a GPU by value, so that a graph does not see new values.
        self._loose = [x for x in leaves if type(x) in _PLAIN and x.layout is torch.strided]
        self._known_loose = self._state_of_loose()
        # A replaced dictionary of hooks is noticed among the values once it holds a hook.
        self._hooks = list(chain.from_iterable(map(_HOOKS, inside)))
        self._children_of = [own["_modules"] for own in self._dicts if _is_filled(own["_modules"])]
        self._children = self._all(self._children_of)
        own_code = [own for own, cls in zip(self._dicts, self._types, strict=True) if cls not in _RELEVANT]
        self._empty = [own[kind] for own in own_code for kind in (*_TENSORS, "_modules") if own[kind] == {}]
        self._tensors_of = [own[kind] for own in self._dicts for kind in _TENSORS if _is_filled(own[kind])]
        self._held = self._all(self._tensors_of)
        self._ids = list(map(id, self._held))
        self._tensors = [tensor for tensor in self._held if tensor is not None]
        self._buffers = [tensor for tensor in self._tensors if not isinstance(tensor, nn.Parameter)]
        self.reason = self._reason()
        if self.reason is None:
            self._forms = Forms(self._tensors)
            self._addresses = list(map(Tensor.data_ptr, self._tensors))
            self._versions = _versions(self._buffers)

    def is_current(self) -> bool:
        """Whether nothing has changed that a graph would miss."""
        try:
            return (
                all(map(is_, map(vars, self._modules), self._dicts))
                and list(map(len, self._sized)) == self._sizes
                and list(map(_names, self._packing)) == self._names
                and list(map(call, self._getters, self._dicts)) == self._values
                and self._containers == self._contents
                and list(map(type, self._modules)) == self._types
                and self._all(self._children_of) == self._children
                and list(map(id, chain.from_iterable(map(dict.values, self._tensors_of)))) == self._ids
                and not any(self._empty)
                and self._all_members() == self._members
                and list(map(dict, map(vars, self._configs))) == self._known_configs
                and (self._reason() == self.reason if self.reason is not None else self._is_same_memory())
            )
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, or cannot be compared with its former value
            return False

    def _is_same_memory(self) -> bool:
        return (
            list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and self._forms.same(self._tensors)
            and _versions(self._buffers) == self._versions
            and (not self._loose or self._state_of_loose() == self._known_loose)
            and not (any(self._hooks) and any(map(_is_seen, self._hooks)))
            and not _has_any_global_hook()
        )

    def _all_members(self) -> list[Any]:
        return list(chain.from_iterable(map(MappingProxyType.values, self._namespaces)))

    def _state_of_loose(self) -> list[Any]:
        return [*map(Tensor.data_ptr, self._loose), *_versions(self._loose)]

    @staticmethod
    def _all(dicts: list[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, dicts)))

    def _reason(self) -> str | None:
        """Why no graph of this model can be captured, or None."""
        if any(module.training for module in self._modules):
            return "a module in train mode"
        if _has_any_global_hook():
            return "a global module hook"
        for config in self._configs:
            if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
                return "the config asks for hidden states or attention weights"
            if not getattr(config, "return_dict", True):
                return "the config asks for tuples (return_dict=False)"
        for module in self._modules[1:]:
            if isinstance(module, torch.jit.ScriptModule):
                return "a module in TorchScript"
            if any(map(_is_seen, _HOOKS(vars(module)))):
                return f"a hook on a {type(module).__name__}"
        if not self._tensors:
            return "no parameters"
        device = self._tensors[0].device
        for tensor in self._tensors:
            if not is_plain_tensor(tensor):
                return f"a {type(tensor).__name__} among the parameters and buffers"
            if tensor.device != device:
                return f"parameters on {device} and {tensor.device}"
        return None

    def may_pad(self) -> bool:
        """Whether every module is known to keep rows and positions apart, so that those around a batch change nothing in it.

        A user's own module may average over all positions, and an attention function of the user's may ignore the mask.
        """
        return all(map(_keeps_positions_apart, self._modules[1:])) and not any(
            implementation_reason(getattr(config, "_attn_implementation", None)) for config in self._configs
        )

    @property
    def device(self) -> Any:
        """The device of all parameters."""
        return self._tensors[0].device


# An attribute that encoders that pack have at times; whoever captures and replays takes it into account.
_TRANSIENT = "caller_counts"
# Attributes that say nothing about a module's forward: torch's bookkeeping, and what fastbert keeps on modules.
_IRRELEVANT = {
    *("_non_persistent_buffers_set", "_is_full_backward_hook", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
    *(
        "_load_state_dict_post_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_fastbert_graphs",
        "_fastbert_state",
        "_is_hf_initialized",
        _TRANSIENT,
    ),
}


# The attributes that matter of torch's own modules, of which a model has hundreds.
_OF_EVERY = ("_parameters", *_HOOK_KINDS)
_RELEVANT = {
    nn.Linear: _OF_EVERY,
    nn.Dropout: ("training", *_HOOK_KINDS),
    nn.Embedding: (*_OF_EVERY, "padding_idx", "max_norm", "norm_type"),
    nn.LayerNorm: (*_OF_EVERY, "eps", "normalized_shape"),
}


_PRISTINE = {
    type(module): vars(module).keys() | _IRRELEVANT
    for module in (
        nn.Linear(1, 1, device="meta"),
        nn.Dropout(),
        nn.Embedding(1, 1, device="meta"),
        nn.LayerNorm(1, device="meta"),
    )
}
_PLAIN = (Tensor, nn.Parameter)
_LIBRARIES = ("torch.", "transformers.", "fastbert.", "builtins")


def _relevant(module: nn.Module) -> Iterable[str]:
    """The attributes of a module that may matter to its forward, and at least one."""
    own, cls = vars(module), type(module)
    return (*_RELEVANT[cls], *(own.keys() - _PRISTINE[cls])) if cls in _RELEVANT else _names(own)


_APART = {nn.Linear, nn.Dropout, nn.Embedding, nn.LayerNorm, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ReLU}
_APART |= {nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ParameterDict, nn.ParameterList}
_APART_IN = (
    *(f"transformers.models.{family.path}" for family in FAMILIES),
    *("transformers.activations", "fastbert.", "peft.", "torch.nn.utils.parametr"),
)


def _keeps_positions_apart(module: nn.Module) -> bool:
    cls = type(module)
    if forward_replaced(module) and not hasattr(module, "_old_forward"):  # accelerate's hooks keep it there
        return False
    return cls in _APART or cls.__module__.startswith(_APART_IN) or "parametrizations" in module._modules


def _is_of_a_library(cls: type) -> bool:
    return cls.__module__.startswith(_LIBRARIES)


def _modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model`, itself first, with those that attributes hold in plain containers or by a bound method."""
    found = dict.fromkeys(model.modules())
    waiting = list(found)
    for module in waiting:  # which grows meanwhile
        for leaf in _leaves(_attributes(vars(module))):
            hidden = leaf.__self__ if isinstance(leaf, MethodType) else leaf
            if isinstance(hidden, nn.Module) and hidden not in found:
                new = [one for one in hidden.modules() if one not in found]
                found.update(dict.fromkeys(new))
                waiting += new
    return list(found)


def _attributes(own: dict[str, Any]) -> list[Any]:
    """The values of a module's attributes that have no checks of their own."""
    return [value for name, value in own.items() if name not in _OWN_CHECKS]


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What `values` are, and what containers among them hold."""
    for value in values:
        if isinstance(value, dict):
            yield from _leaves(value.values())
        elif isinstance(value, (list, tuple, set)):
            yield from _leaves(value)
        elif not isinstance(value, _SIMPLE):
            yield value


_SIMPLE = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, type, FunctionType, ModuleType)


def _is_object(value: Any) -> bool:
    """Whether it has attributes of its own that a forward may read."""
    return not isinstance(value, (nn.Module, Tensor, MethodType)) and isinstance(getattr(value, "__dict__", None), dict)


def _registries() -> list[dict[str, Any]]:
    """transformers' functions for attention and masks, by the name of an implementation; those of the process, then others."""
    both = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    found = [getattr(registry, name, None) for registry in both for name in ("_global_mapping", "_local_mapping")]
    return [mapping for mapping in found if isinstance(mapping, dict)]


def _is_filled(registry: Any) -> bool:
    """Whether a module's registry has entries; those of TorchScript are made anew at each look, and cannot be compared."""
    return isinstance(registry, dict) and bool(registry)


def _names(own: dict[str, Any]) -> set[str]:
    """The attributes of a module that may matter to its forward."""
    return own.keys() - _IRRELEVANT


# Dictionaries whose contents are compared on their own.
_OWN_CHECKS = {"_parameters", "_buffers", "_modules", "config", *_HOOK_KINDS, *_IRRELEVANT}


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set)) or (isinstance(value, tuple) and any(map(_is_container, value)))


def _copied(value: Any) -> Any:
    """A copy of containers within containers, holding the same objects."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if type(value) is tuple:
        return tuple([_copied(item) for item in value])
    return set(value) if isinstance(value, set) else value


def _versions(tensors: list[Tensor]) -> list[int | None]:
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _is_seen(hooks: dict[int, Any]) -> bool:
    """Whether any of these hooks does something at each call."""
    return any(not (getattr(hook, "__module__", None) or "").startswith(IDLE_HOOKS) for hook in hooks.values())
