"""Notices whatever changes in a model between the capture of a graph and its replay.

A graph repeats what its capture did: it reads parameters at their addresses and knows nothing of modules. New values at the
same addresses it sees. Anything else (another parameter, address or dtype, a module, an attribute, a hook, train mode) would be
ignored, so the next call must notice it. Everything is compared, by identity, in a few C calls over the whole model.
"""

from itertools import chain
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert.dispatch import IDLE_HOOKS, is_plain_tensor
from fastbert.kernels.adamw.tensor_forms import Forms

_FORWARD = itemgetter("forward")
_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks")  # without gradients those of the backward do nothing
_HOOKS = itemgetter(*_HOOK_KINDS)
_TENSORS = ("_parameters", "_buffers")


class ModelState:
    """The modules, parameters, buffers, attributes and hooks of `model` at one moment.

    Hooks on the model itself do not count: they run around each call, replayed or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._dicts = [vars(module) for module in self._modules]
        self._types = list(map(type, self._modules))
        lineages = chain.from_iterable(cls.__mro__ for cls in dict.fromkeys(self._types))
        self._classes = [cls for cls in dict.fromkeys(lineages) if "forward" in vars(cls)]
        self._forwards = list(map(_FORWARD, map(vars, self._classes)))
        inside = self._dicts[1:]
        self._packing = [vars(module) for module in self._modules if hasattr(type(module), _TRANSIENT)]
        self._names = list(map(_names, self._packing))
        self._sized = [own for own in self._dicts if all(own is not other for other in self._packing)]
        self._sizes = list(map(len, self._sized))
        self._getters = [itemgetter(*_RELEVANT.get(type(m), _names(vars(m)))) for m in self._modules]
        self._values = list(map(call, self._getters, self._dicts))
        # Lists and dictionaries among them, such as a LoRA layer's merged adapters, may change in place.
        self._containers = [x for own in self._dicts for name, x in own.items() if name not in _OWN_CHECKS and _is_container(x)]
        self._contents = list(map(_copied, self._containers))
        # A replaced dictionary of hooks is noticed among the values once it holds a hook.
        self._hooks = list(chain.from_iterable(map(_HOOKS, inside)))
        self._children_of = [own["_modules"] for own in self._dicts if _is_filled(own["_modules"])]
        self._children = self._all(self._children_of)
        self._tensors_of = [own[kind] for own in self._dicts for kind in _TENSORS if _is_filled(own[kind])]
        self._held = self._all(self._tensors_of)
        self._ids = list(map(id, self._held))
        self._tensors = [tensor for tensor in self._held if tensor is not None]
        self._buffers = [tensor for tensor in self._tensors if not isinstance(tensor, nn.Parameter)]
        self._configs = list({id(own["config"]): own["config"] for own in self._dicts if "config" in own}.values())
        self._known_configs = list(map(dict, map(vars, self._configs)))
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
                and list(map(_FORWARD, map(vars, self._classes))) == self._forwards
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
            and not (any(self._hooks) and any(map(_is_seen, self._hooks)))
            and not _has_any_global_hook()
        )

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


def _is_filled(registry: Any) -> bool:
    """Whether a module's registry has entries; those of TorchScript are made anew at each look, and cannot be compared."""
    return isinstance(registry, dict) and bool(registry)


def _names(own: dict[str, Any]) -> set[str]:
    """The attributes of a module that may matter to its forward."""
    return own.keys() - _IRRELEVANT


# Dictionaries whose contents are compared on their own.
_OWN_CHECKS = {"_parameters", "_buffers", "_modules", *_HOOK_KINDS, *_IRRELEVANT}


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set))


def _copied(value: Any) -> Any:
    """A copy of containers within containers, holding the same objects."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return set(value) if isinstance(value, set) else value


def _versions(tensors: list[Tensor]) -> list[int | None]:
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _is_seen(hooks: dict[int, Any]) -> bool:
    """Whether any of these hooks does something at each call."""
    return any(not (getattr(hook, "__module__", None) or "").startswith(IDLE_HOOKS) for hook in hooks.values())
