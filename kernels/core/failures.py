"""A kernel that cannot be compiled or launched: plain PyTorch computes its part, and the log says so once.

`launch` makes KernelFailed of the error. A launcher decorated with `or_plain(twin)` then hands its arguments to the twin,
which stands beside it, in that call and in all later ones: nothing is compiled again at each step. The twin returns what
the launcher returns and draws the same dropout from the same seed, so that any of a forward, its backward and a recomputed
forward may fail alone: the gradients are still those of the outputs. It runs inside the same autograd function and the same
custom op, so torch.compile and gradient checkpointing notice nothing.

An error that is not the kernel's is raised as it came: a device on which nothing runs any more, or a launch inside the
capture of a CUDA graph, where much is forbidden that works outside. Nothing is switched off by it.
"""

import errno
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
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
# How many launches fell back to plain PyTorch, and whose failure made the last one.
fallbacks = 0
last_failed = ""
_failed: dict[Callable[..., Any], str] = {}  # launchers, with the kernel of theirs that failed

# Errors of earlier work on the device that a launch is merely the first to hear of, after which nothing runs there.
# In lower case, as all texts below; some drivers' errors come by name, some by description.
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
# The process may use the GPU no more, or not yet again: its context is destroyed, it was forked, or it is ending.
_OF_THE_CONTEXT = (
    "busy or unavailable",
    "context_is_destroyed",
    "context is destroyed",
    "deinitialized",
    "driver shutting down",
    "initialization error",
    "invalid_context",
    "invalid device context",
    "invalid_handle",
    "invalid resource handle",
    "no cuda-capable device",
    "not_initialized",
    "re-initialize cuda",
)
# A policy's own, of selective checkpointing: in the interpreter it sees what a launch does.
_OF_CHECKPOINTING = ("selective activation checkpoint", "not found in storage")
_OF_A_CAPTURE = "captur"  # "operation not permitted when stream is capturing", cudaErrorStreamCaptureInvalidated, ...
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)


class KernelFailed(RuntimeError):
    """`kernel` could not be compiled or launched. Nothing was computed; what it was to write is as before."""

    left: list[int]  # of an optimizer's step: the parameters that did not take it

    def __init__(self, kernel: str, error: BaseException) -> None:
        text = str(error).strip().splitlines()
        self.kernel = kernel
        self.reason = f"{type(error).__name__}: {text[-1].strip()[:200] if text else 'without a message'}"
        super().__init__(f"{kernel} could not be compiled or launched ({self.reason})")


def is_of_the_kernel(error: Exception, device: torch.device) -> bool:
    """Whether compiling or launching went wrong, and not the device, its memory, or a kernel's code in the interpreter.

    While a CUDA graph is captured nothing is taken for the kernel's fault: what fails there may well work outside.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, InterpreterError, KernelFailed)):
        return False
    others = (*_OF_THE_DEVICE, *_OF_THE_CONTEXT, *_OF_CHECKPOINTING, _OF_A_CAPTURE)
    return not (_mentions(error, *others) or _is_capturing(device))


def advise(kernel: str, error: Exception, device: torch.device) -> None:
    """Add to an error that is not the kernel's what can be done about it, where something can."""
    if _mentions(error, _OF_A_CAPTURE) or _is_capturing(device):
        error.add_note(
            f"fastbert: the launch of {kernel} failed inside a CUDA graph capture. Nothing is switched off by that. Run the "
            "step once before capturing it, so that its kernels are compiled and loaded, then capture it again."
        )
    elif _mentions(error, *_OF_THE_CONTEXT):
        error.add_note(
            f"fastbert: {kernel} cannot be launched because this process has no CUDA context that works: it was destroyed, "
            "the process was forked after CUDA had been used, or it is ending. Use the GPU in a new process."
        )


def _mentions(error: Exception, *texts: str) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in texts)


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, on the device's current stream; asked only when a launch has failed."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        # The default stream cannot be asked while another one captures, and no stream without a context; on the CPU there
        # may be none to ask.
        return device.type == "cuda"


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


def record(failure: KernelFailed) -> None:
    """Remember why a kernel is not used, and say so if it is not known yet."""
    if failure.kernel not in reasons:
        reasons[failure.kernel] = failure.reason
        logger.warning(
            "fastbert: %s. Plain PyTorch computes its part from now on: the results are right, the speed is not. "
            "Please report this line together with what the command `fastbert env` prints.",
            failure,
            exc_info=failure.__cause__,
        )


def reset() -> None:
    """Try every kernel again."""
    reasons.clear()
    _failed.clear()


def or_plain(twin: Callable[..., Any], after: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Decorates a launcher: `twin` takes its arguments from the call on in which one of its kernels fails.

    `after` is the launcher whose output this one reads: if that one's twin ran, so does this one's. float64 is always the
    twin's on a GPU, which is no failure: kernels compute it in the interpreter alone, for gradcheck.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def launched(*arguments: Any, **keywords: Any) -> Any:
            wide = is_wide(*arguments)
            if not wide and (not _failed or (launcher not in _failed and after not in _failed)):
                try:
                    return launcher(*arguments, **keywords)
                except KernelFailed as failure:
                    if strict:
                        raise
                    record(failure)
                    _failed[launcher] = failure.kernel
            if not wide:
                _count(_failed.get(launcher) or _failed[after])
            device = next(x.device.type for x in tensors(arguments))
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return twin(*arguments, **keywords)

        launched.launcher = launcher
        return launched

    after = getattr(after, "launcher", after)
    return decorate


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among a launcher's arguments, which may be in tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


def is_wide(*arguments: Any) -> bool:
    """Whether a tensor among these is one of float64 on a GPU, for which there is no kernel."""
    return any([x.dtype == torch.float64 and x.is_cuda for x in tensors(arguments)])


def _count(kernel: str) -> None:
    global fallbacks, last_failed
    fallbacks, last_failed = fallbacks + 1, kernel
