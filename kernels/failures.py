"""A kernel that cannot be compiled or launched: plain PyTorch computes its part, and the log says so once.

`launch` makes KernelFailed of the error. A launcher decorated with `or_plain(twin)` then hands its arguments to the twin
(plain.py), in that call and in all later ones: nothing is compiled again at each step. The twin returns what the launcher
returns and draws the same dropout from the same seed, so that any of a forward, its backward and a recomputed forward may
fail alone: the gradients are still those of the outputs. It runs inside the same autograd function and the same custom
op, so torch.compile and gradient checkpointing notice nothing.
"""

import errno
import logging
import tempfile
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import InterpreterError

logger = logging.getLogger("fastbert")

# Raise instead: where a kernel is tested or timed, nothing may quietly stand in for it.
strict = False
# Why a kernel is not used, by its name. Empty in a process in which all is well.
reasons: dict[str, str] = {}
# How many launches plain PyTorch stood in for, and for the sake of which kernel last.
stood_in = 0
last = ""
_failed: dict[Callable[..., Any], str] = {}  # launchers, with the kernel of theirs that failed

# Errors of earlier work on the device that a launch is merely the first to hear of, after which nothing runs there.
_OF_THE_DEVICE = (
    "device-side assert",
    "illegal address",
    "illegal instruction",
    "illegal memory access",
    "invalid address space",
    "invalid program counter",
    "launch failure",
    "launch timed out",
    "misaligned address",
    "out of memory",
    "stack error",
    "uncorrectable",
)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


class KernelFailed(RuntimeError):
    """`kernel` could not be compiled or launched. Nothing was computed; what it was to write is as before."""

    left: list[int]  # of an optimizer's step: the parameters that did not take it

    def __init__(self, kernel: str, error: BaseException) -> None:
        text = str(error).strip().splitlines()
        self.kernel = kernel
        self.reason = f"{type(error).__name__}: {text[-1].strip()[:200] if text else 'without a message'}"
        super().__init__(f"{kernel} could not be compiled or launched ({self.reason})")


def is_of_the_kernel(error: Exception) -> bool:
    """Whether compiling or launching went wrong, and not the device, its memory, or a kernel's code in the interpreter."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, InterpreterError, KernelFailed)):
        return False
    return not (isinstance(error, RuntimeError) and any(text in str(error) for text in _OF_THE_DEVICE))


def move_cache(error: Exception) -> bool:
    """Where the error is that Triton's cache cannot be written: have it in a temporary folder from now on, once."""
    if not isinstance(error, OSError) or error.errno not in _NOT_WRITABLE or move_cache.folder:
        return False
    move_cache.folder = tempfile.TemporaryDirectory(prefix="fastbert-triton-")  # removed when the process ends
    logger.warning(
        "Triton's cache %s cannot be written (%s): kernels are compiled into a temporary folder, again in each process. "
        "Set TRITON_CACHE_DIR to a folder that can be written.",
        triton.knobs.cache.dir,
        error,
    )
    triton.knobs.cache.dir = move_cache.folder.name
    return True


move_cache.folder = None


def note(failure: KernelFailed) -> None:
    """Remember why a kernel is not used, and say so if it is not known yet."""
    if failure.kernel not in reasons:
        reasons[failure.kernel] = failure.reason
        logger.warning(
            "fastbert: %s. Plain PyTorch computes its part from now on: the results are right, the speed is not. "
            "Please report this line together with what the command `fastbert env` prints.",
            failure,
            exc_info=failure.__cause__,
        )


def forget() -> None:
    """Try every kernel again."""
    reasons.clear()
    _failed.clear()


def or_plain(twin: Callable[..., Any], after: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Decorates a launcher: `twin` takes its arguments from the call on in which one of its kernels fails.

    `after` is the launcher whose output this one reads: if that one's twin ran, so does this one's.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def launched(*arguments: Any, **keywords: Any) -> Any:
            if not _failed or (launcher not in _failed and after not in _failed):
                try:
                    return launcher(*arguments, **keywords)
                except KernelFailed as failure:
                    if strict:
                        raise
                    note(failure)
                    _failed[launcher] = failure.kernel
            _count(_failed.get(launcher) or _failed[after])
            device = next(x.device.type for x in arguments if isinstance(x, Tensor))
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return twin(*arguments, **keywords)

        launched.launcher = launcher
        return launched

    after = getattr(after, "launcher", after)
    return decorate


def _count(kernel: str) -> None:
    global stood_in, last
    stood_in, last = stood_in + 1, kernel
