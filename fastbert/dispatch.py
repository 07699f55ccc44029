"""Decides per call whether tensors can go to a kernel, and counts kernel calls and fallbacks for `fastbert.report`.

The counts live in a weak dictionary beside the modules, not on them, so a patched module's `__dict__` stays that of the
stock module.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import ops
from fastbert.kernels.core.collectives import is_pending
from fastbert.wrapped import base_of, with_base

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT64 = "torch.float64 has no kernel on a GPU"


@dataclass
class Calls:
    """Calls of one module since it was patched: kernel calls, and stock calls by reason."""

    kernel: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


_calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_lock = Lock()  # nn.DataParallel calls each replica in its own thread, and all of them share one tally


def calls(module: nn.Module) -> Calls:
    """The tally of `module`."""
    return _calls.get(module) or Calls()


def clear_calls(module: nn.Module) -> None:
    """Drop the tally of `module`."""
    _calls.pop(module, None)


if TYPE_CHECKING:
    _Mixed = nn.Module  # what every fast class is, through the stock class that it also derives from
else:
    _Mixed = object


class FastModule(_Mixed):
    """Base of every fast class; `isinstance(module, FastModule)` identifies a patched module.

    nn.DataParallel makes replicas of a module at every call; their calls are added to the module's own tally.
    """

    def _replicate_for_data_parallel(self) -> Any:
        return share_calls(self, super()._replicate_for_data_parallel())


def share_calls(module: nn.Module, replica: nn.Module) -> nn.Module:
    """Let `replica` count its calls in the tally of `module`, and return it."""
    with _lock:
        _calls[replica] = _calls.setdefault(module, Calls())
    return replica


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of `module` without those that graphs, and engines such as FSDP2, have put over it."""
    cls = base_of(type(module))
    return vars(cls).get("WITHOUT_GRAPHS", cls)


def set_kind(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` the class `cls`, below what an engine such as FSDP2 has put over its present one."""
    module.__class__ = with_base(type(module), cls)


def falls_back(module: nn.Module, reason: str | None) -> bool:
    """Count this call of `module` and return whether it falls back to stock code, which it does if there is a reason."""
    if not torch.compiler.is_compiling():  # a call is traced once and runs many times, so a count would be wrong
        with _lock:
            tally = _calls.get(module)
            if tally is None:
                tally = _calls[module] = Calls()
            if reason is None:
                tally.kernel += 1
            else:
                tally.fallbacks[reason] += 1
    return reason is not None


def run(module: nn.Module, op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return op(*arguments, **options) for a call that does not fall back.

    If a kernel fails in it and plain PyTorch computes its part, the call is counted as a fallback after all.
    """
    if torch.compiler.is_compiling():
        return op(*arguments, **options)
    counted = ops.failures.counted  # of this thread: what another thread's kernels do is not this call's
    before = counted.fallbacks
    result = op(*arguments, **options)
    if counted.fallbacks != before:
        kernel = counted.last_failed
        _recount(module, f"{kernel} failed: {ops.failures.reasons[kernel]}")
    return result


def _recount(module: nn.Module, reason: str) -> None:
    """Turn a call of `module` that was counted for the kernel into a fallback."""
    with _lock:
        tally = _calls[module]
        tally.kernel -= 1
        tally.fallbacks[reason] += 1


def falls_back_after(module: nn.Module, *results: Tensor) -> bool:
    """Whether a call of `module`, which was counted for the kernel, falls back because of what modules inside it returned.

    A Linear with hooks for tensor parallelism may return a DTensor, with which only torch's own ops can go on. The result of
    a collective under way is a subclass too, but ops wait for it (kernels/core/collectives.py).
    """
    if torch.compiler.is_compiling():
        return False
    found = next((x for x in results if not is_plain_tensor(x) and not is_pending(type(x))), None)
    if found is not None:
        _recount(module, f"a Linear inside it returned a {type(found).__name__}")
    return found is not None


def tensor_reason(*tensors: Tensor) -> str | None:
    """Why no kernel can take these tensors together, or None. Inputs come first, then parameters."""
    first = tensors[0]
    autocast = _has_autocast(first.device.type) and torch.is_autocast_enabled(first.device.type)
    for tensor in tensors:
        if tensor.device != first.device:
            return f"tensors on {first.device} and {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} has no kernel"
        if tensor.dtype == torch.float64 and tensor.is_cuda:
            return _FLOAT64
        if tensor.dtype != first.dtype and not autocast:
            return f"{first.dtype} and {tensor.dtype} together outside autocast"
        if type(tensor) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"{type(tensor).__name__} is not a plain tensor"
    dtype = torch.get_autocast_dtype(first.device.type) if autocast else first.dtype
    return _device_reason(first.device, dtype) or mode_reason()


@torch.compiler.assume_constant_result  # torch 2.11 traces no is_autocast_available
def _has_autocast(device_type: str) -> bool:
    """Whether `torch.is_autocast_enabled` accepts this device type; it raises for the meta device."""
    return torch.amp.is_autocast_available(device_type)


@torch.compiler.assume_constant_result
def _device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return device_reason(device, dtype)


@cache
def device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel takes tensors of this dtype on this device, or None."""
    if ops.MISSING:
        return ops.MISSING
    if ops.INTERPRETED and device.type == "cpu":
        return "bfloat16 is wrong in Triton's interpreter" if dtype == torch.bfloat16 else None
    if device.type == "cuda" and dtype == torch.float64:
        return _FLOAT64
    if device.type != "cuda" or torch.version.hip is not None:
        return f"tensors on {device.type}: the kernels need an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}: the kernels need 8.0 or newer"


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype in which autocast runs matrix products, or None if autocast is off."""
    if not (_has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


def mode_reason() -> str | None:
    """Why no kernel can run under torch's current mode (tracing, functorch, forward AD), or None."""
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit cannot trace the kernels"
    # torch's stubs of its extension leave this module out.
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.func transforms use stock code"
    if torch.autograd.forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivative"
    return None


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a torch.Tensor or nn.Parameter, not a subclass, or the fake tensor that torch.export uses."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    return torch.compiler.is_exporting() and type(tensor) is torch._subclasses.FakeTensor


def _library_forward(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a library's class; None if it was replaced."""
    code = getattr(cls.forward, "__code__", None)
    return cls.forward if code and code.co_filename == sys.modules[cls.__module__].__file__ else None


# The classes whose work the kernels take over, each with the forward that it must still have.
_LIBRARY: dict[type[nn.Module], Callable[..., Any] | None] = {
    cls: _library_forward(cls) for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)
}


def register_library_classes(*classes: type[nn.Module]) -> None:
    """Let `is_plain` accept modules of these classes as well."""
    _LIBRARY.update({cls: _library_forward(cls) for cls in classes})


def forward_replaced(module: nn.Module) -> bool:
    """Whether a forward set on the instance differs from its class's.

    transformers 5.0 leaves the class's forward on the instance after it has captured outputs; that does not count.
    """
    return "forward" in module.__dict__ and not class_forward_on_instance(module)


def class_forward_on_instance(module: nn.Module) -> bool:
    """Whether the class's own forward is also set on the instance."""
    forward = vars(module).get("forward")
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def class_forward_replaced(cls: type[nn.Module]) -> bool:
    """Whether `cls` is a registered library class whose forward is no longer the library's."""
    return cls in _LIBRARY and cls.forward is not _LIBRARY[cls]


def is_plain(module: nn.Module, cls: type[nn.Module], idle: str | None = None) -> bool:
    """Whether `module` is exactly a `cls` whose call runs the library's `cls.forward` and nothing else.

    It has no hooks, and neither the instance's nor the class's forward is replaced. Forward hooks named `idle` are
    ignored.
    """
    return (
        type(module) is cls
        and (not module._forward_hooks or _idle(module._forward_hooks, idle))
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not forward_replaced(module)
        and cls.forward is _LIBRARY.get(cls)
        and not _has_any_global_hook()
    )


def _idle(hooks: dict[int, Any], idle: str | None) -> bool:
    return idle is not None and all(getattr(hook, "__name__", None) == idle for hook in hooks.values())


# Hooks that transformers leaves on modules to capture outputs. They do nothing until outputs are requested.
IDLE_HOOKS = ("transformers.utils.output_capturing",)


# The attributes of a module that hold its hooks, one dictionary per kind.
HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The module's hook dictionaries, one per kind."""
    return [getattr(module, kind) for kind in HOOK_KINDS]


def hooked(module: nn.Module, idle: tuple[str, ...] = IDLE_HOOKS) -> bool:
    """Whether a hook (a global one included) observes calls of `module`, or its forward is replaced.

    Hooks defined in Python modules whose names start with one of `idle` are ignored.
    """
    if forward_replaced(module):
        return True
    for hooks in hooks_of(module):
        if hooks and any(not (getattr(hook, "__module__", None) or "").startswith(idle) for hook in hooks.values()):
            return True
    return bool(_has_any_global_hook())
