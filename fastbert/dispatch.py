"""Each call decides: may these tensors go to a kernel, and if not, why not. The tally is what `report` shows."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import ops

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOAT64 = "torch.float64 has no kernel on a GPU"


@dataclass
class Calls:
    """Calls of one module since it was patched: through the kernel, and to stock code by reason."""

    kernel: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


# Beside the modules, not on them: a patched module's __dict__ stays that of the stock one.
_calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_lock = Lock()  # replicas of a module are called by threads of their own and count as one


def calls(module: nn.Module) -> Calls:
    """The tally of `module`."""
    return _calls.get(module) or Calls()


def clear_calls(module: nn.Module) -> None:
    """Drop the tally of `module`."""
    _calls.pop(module, None)


class FastModule:
    """What every fast class inherits, by which they are told from stock's.

    nn.DataParallel makes replicas of a module at every call: their calls count as the module's own.
    """

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        with _lock:
            _calls[replica] = _calls.setdefault(self, Calls())
        return replica


def falls_back(module: nn.Module, reason: str | None) -> bool:
    """Whether this call goes to stock code, which it does when there is a reason; tallied either way."""
    if not torch.compiler.is_compiling():  # traced once, run many times: a count would be wrong
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
    """op(...) for a call that does not fall back. If a kernel failed and plain PyTorch computed its part, it is tallied so."""
    if torch.compiler.is_compiling():
        return op(*arguments, **options)
    before = ops.failures.fallbacks
    result = op(*arguments, **options)
    if ops.failures.fallbacks != before:
        tally, kernel = _calls[module], ops.failures.last_failed
        with _lock:
            tally.kernel -= 1
            tally.fallbacks[f"{kernel} failed: {ops.failures.reasons[kernel]}"] += 1
    return result


def tensor_reason(*tensors: Tensor) -> str | None:
    """Why no kernel can take these tensors together (inputs first, then parameters), or None."""
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
    """Of the meta device, on which models are built, torch refuses to say whether autocast is on."""
    return torch.amp.is_autocast_available(device_type)


@torch.compiler.assume_constant_result
def _device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    return device_reason(device, dtype)


@cache
def device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel takes tensors of this type on this device, or None."""
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
    """The dtype that autocast has products run in, None where it is off."""
    if not (_has_autocast(device_type) and torch.is_autocast_enabled(device_type)):
        return None
    return torch.get_autocast_dtype(device_type)


def mode_reason() -> str | None:
    """Why no kernel runs in what torch is doing now, whatever the tensors, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit traces no kernels"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms go through stock code"
    if torch.autograd.forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivative"
    return None


def is_plain_tensor(tensor: Tensor) -> bool:
    """Whether `tensor` is torch's own, or what torch.export lets stand for one."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    return torch.compiler.is_exporting() and type(tensor) is torch._subclasses.FakeTensor


def _library_forward(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a library's class; None if somebody has put another in its place."""
    code = getattr(cls.forward, "__code__", None)
    return cls.forward if code and code.co_filename == sys.modules[cls.__module__].__file__ else None


# The classes whose work the kernels do in their place, with the forward that each then has to have.
_LIBRARY = {cls: _library_forward(cls) for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)}


def register_library_classes(*classes: type[nn.Module]) -> None:
    """Let modules of these classes, too, be plain."""
    _LIBRARY.update({cls: _library_forward(cls) for cls in classes})


def forward_replaced(module: nn.Module) -> bool:
    """Whether `module` has a forward of its own. Its class's, which transformers 5.0 leaves there when it has captured
    outputs, is none."""
    return "forward" in module.__dict__ and not class_forward_on_instance(module)


def class_forward_on_instance(module: nn.Module) -> bool:
    """Whether the forward of the class stands on `module` itself, too."""
    forward = vars(module).get("forward")
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


def class_forward_replaced(cls: type[nn.Module]) -> bool:
    """Whether the forward of `cls` is known here and no longer the library's."""
    return cls in _LIBRARY and cls.forward is not _LIBRARY[cls]


def is_plain(module: nn.Module, cls: type[nn.Module], idle: str | None = None) -> bool:
    """Whether `module` is exactly a `cls` whose call does nothing but the library's `cls.forward`: no hooks, nothing
    replaced on the module or on its class.

    Forward hooks of the name `idle` are those that do nothing here.
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


# Hooks that transformers leaves on modules to capture outputs: they see nothing until outputs are asked for.
IDLE_HOOKS = ("transformers.utils.output_capturing",)


# The attributes of a module that hold its hooks, a dictionary of each kind.
HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Its own, of each kind: empty where there are none."""
    return [getattr(module, kind) for kind in HOOK_KINDS]


def hooked(module: nn.Module, idle: tuple[str, ...] = IDLE_HOOKS) -> bool:
    """Whether anything sees what `module` is given or gives, or has replaced its forward; hooks from below the modules
    `idle` aside."""
    if forward_replaced(module):
        return True
    for hooks in hooks_of(module):
        if hooks and any(not (getattr(hook, "__module__", None) or "").startswith(idle) for hook in hooks.values()):
            return True
    return _has_any_global_hook()
