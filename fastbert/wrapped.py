"""Looks through what torch's engines for many GPUs and for checkpointing put over the modules of a model.

- FSDP2's `fully_shard` and the composable `replicate` change the class: `FSDPBertLayer(FSDPModule, BertLayer)`.
- FSDP 1 and `checkpoint_wrapper` put a module around it: `encoder.layer[0]` is a wrapper, which calls the layer.

All of them call the module's own forward with its own arguments, of which they may cast or move tensors.
"""

from functools import cache
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

SHARDING = "torch.distributed.fsdp"  # whose hooks gather weights, cast floating-point arguments, and pass everything on
MARKS = {"_is_fsdp_managed_module", "_fsdp_use_orig_params"}  # attributes that FSDP sets on every module inside
_TORCH = "torch.distributed."
_FSDP_1 = "FullyShardedDataParallel"
_WRAPPED = {"CheckpointWrapper": "_checkpoint_wrapped_module", _FSDP_1: "_fsdp_wrapped_module"}


def base_of(cls: type[Any]) -> type[Any]:
    """The class below one that torch made for a sharded or replicated module; any other class itself."""
    bases = cls.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__module__.startswith(_TORCH) else cls


def with_base(cls: type[Any], base: type[Any]) -> type[Any]:
    """`base`, with the class over it that `cls` has over its own base."""
    return base if base_of(cls) is cls else _over(cls.__bases__[0], base, cls)


@cache
def _over(engine: type[Any], base: type[Any], cls: type[Any]) -> type[Any]:
    prefix = cls.__name__.removesuffix(base_of(cls).__name__)
    own = {name: value for name, value in vars(cls).items() if name in ("__module__", "__deepcopy__")}
    return type(prefix + base.__name__, (engine, base), own)


def sharded_part(model: nn.Module) -> nn.Module | None:
    """A module of `model` that an engine has sharded or replicated in place, so that torch copies none of it; or None."""
    found = (m for m in model.modules() if base_of(type(m)) is not type(m) or type(m).__name__ == _FSDP_1)
    return next(found, None)


def behind(module: nn.Module) -> nn.Module:
    """The module that a wrapper of torch's calls, or the innermost of several; any other module itself."""
    while (name := _attribute(module)) is not None:
        module = cast(nn.Module, module._modules[name])
    return module


def wrappers_of(module: nn.Module) -> list[nn.Module]:
    """The wrappers around `behind(module)`, the outermost first."""
    found = []
    while (name := _attribute(module)) is not None:
        found.append(module)
        module = cast(nn.Module, module._modules[name])
    return found


def _attribute(module: nn.Module) -> str | None:
    """Where a wrapper of torch's has the module that it calls."""
    cls = base_of(type(module))
    name = _WRAPPED.get(cls.__name__)
    if name is None or not cls.__module__.startswith(_TORCH):
        return None
    # A checkpointing function of the user's would see the arguments.
    function = getattr(vars(module).get("checkpoint_fn"), "func", checkpoint)
    return name if function is checkpoint else None
