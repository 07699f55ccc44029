"""Each call decides: may these tensors go to a kernel, and if not, why not. The tally is what `report` shows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import ops

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Calls:
    """Calls of one module since it was patched: through the kernel, and to stock code by reason."""

    kernel: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


# Beside the modules, not on them: a patched module's __dict__ stays that of the stock one.
_calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()


def calls(module: nn.Module) -> Calls:
    """The tally of `module`."""
    return _calls.get(module) or Calls()


def forget(module: nn.Module) -> None:
    """Drop the tally of `module`."""
    _calls.pop(module, None)


def refused(module: nn.Module, reason: str | None) -> bool:
    """Whether this call goes to stock code, which it does when there is a reason; tallied either way."""
    if not torch.compiler.is_compiling():  # traced once, run many times: a count would be wrong
        tally = _calls.setdefault(module, Calls())
        if reason is None:
            tally.kernel += 1
        else:
            tally.fallbacks[reason] += 1
    return reason is not None


def run(module: nn.Module, op: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """op(...) for a call that was not refused. If a kernel failed and plain PyTorch stood in, it is tallied so."""
    if torch.compiler.is_compiling():
        return op(*arguments, **options)
    before = ops.failures.stood_in
    result = op(*arguments, **options)
    if ops.failures.stood_in != before:
        tally, kernel = _calls[module], ops.failures.last
        tally.kernel -= 1
        tally.fallbacks[f"{kernel} failed: {ops.failures.reasons[kernel]}"] += 1
    return result


def tensor_reason(*tensors: Tensor) -> str | None:
    """Why no kernel can take these tensors together (inputs first, then parameters), or None."""
    first = tensors[0]
    # Asked whether it exists first: of the meta device, on which models are built, torch refuses to say the rest.
    autocast = torch.amp.is_autocast_available(first.device.type) and torch.is_autocast_enabled(first.device.type)
    for tensor in tensors:
        if tensor.device != first.device:
            return f"tensors on {first.device} and {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} has no kernel"
        if tensor.dtype != first.dtype and not autocast:
            return f"{first.dtype} and {tensor.dtype} together outside autocast"
        if type(tensor) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            return f"{type(tensor).__name__} is not a plain tensor"
    dtype = torch.get_autocast_dtype(first.device.type) if autocast else first.dtype
    return _device_reason(first.device, dtype) or _mode_reason()


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
    if device.type != "cuda" or torch.version.hip is not None:
        return f"tensors on {device.type}: the kernels need an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}: the kernels need 8.0 or newer"


def _mode_reason() -> str | None:
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


def is_plain(module: nn.Module, cls: type[nn.Module], idle: str | None = None) -> bool:
    """Whether `module` is exactly a `cls` whose call does nothing but `cls.forward`: no hooks, nothing replaced.

    Forward hooks of the name `idle` are those that do nothing here.
    """
    return (
        type(module) is cls
        and all(idle and getattr(hook, "__name__", None) == idle for hook in module._forward_hooks.values())
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and not _has_any_global_hook()
    )
