"""A patched model's own config: a copy that names fastbert's attention. Models that share the stock one never see it."""

import copy
from typing import Any
from weakref import ref

from fastbert.integrations.attention import former_name, patched_name

# A patched config by its id: itself (weakly), the stock config it stands for, and what that held at the time. On the
# config itself it would be saved with the model.
_origins: dict[int, tuple[Any, Any, dict[str, Any]]] = {}


def patched_config(config: Any) -> Any:
    """A copy of `config` that selects fastbert's attention and remembers, by its name, what was selected before."""
    patched = copy.deepcopy(config)
    patched._attn_implementation = patched_name(config._attn_implementation)
    key = id(patched)
    _origins[key] = (ref(patched, lambda _: _origins.pop(key, None)), config, dict(vars(config)))
    return patched


def is_patched(config: Any) -> bool:
    """Whether `config` came out of `patched_config`, or is a copy of one that did."""
    return id(config) in _origins or former_name(getattr(config, "_attn_implementation", None)) is not None


def stock_config(config: Any) -> Any:
    """The config that a patched one stands for, with what was changed on the patched one since (a resized vocabulary).

    A copy of a patched config (deepcopy, pickle) stands for no other object and gets its former attention back.
    """
    former = former_name(config._attn_implementation)
    if id(config) not in _origins:
        stock = copy.copy(config)
        stock._attn_implementation = former
        return stock
    _, stock, then = _origins[id(config)]
    for name, value in vars(config).items():
        chosen_by_patch = name == "_attn_implementation_internal" and former is not None
        if not chosen_by_patch and (name not in then or value != then[name]):
            setattr(stock, name, value)
    return stock
