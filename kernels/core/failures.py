"""The fallback for a kernel that cannot be compiled or launched: plain PyTorch computes its part, and the log says so once.

`launch` turns the error into KernelFailed. A launcher decorated with `or_plain(twin)` then passes its arguments to the twin
beside it, in that call and in all later ones, so that nothing is recompiled at each step. The twin returns what the launcher
returns and draws the same dropout bits from the same seed.

The fallback is the launcher's and not the layer's, so that a forward, its backward or a recomputed forward may fail alone and
their results still belong together, also packed, cached, checkpointed or compiled: the twin runs inside the same autograd
function and the same custom op.

An error that is not the kernel's is raised unchanged: a device on which nothing runs any more, or a launch during the capture
of a CUDA graph, which forbids much that works outside. Such an error disables no kernel.
"""

import errno
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import InterpreterError

logger = logging.getLogger("fastbert")

# Raise instead of falling back. Tests and benchmarks set it, so that nothing but the kernel is tested or timed under its name.
strict = False
# Why a kernel is not used, by kernel name. Empty in a healthy process.
reasons: dict[str, str] = {}
_failed: dict[Callable[..., Any], str] = {}  # launchers that fall back, with the name of the kernel that failed

# Errors of earlier work on the device that a launch merely reports, after which nothing runs on the device.
# In lower case, like all texts below; a driver's error comes by its name or by its description.
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
# The process cannot use the GPU: its context is destroyed, it was forked, or it is exiting.
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
# Raised by a policy of selective checkpointing, which sees a launch's operations in the interpreter.
_OF_CHECKPOINTING = ("selective activation checkpoint", "not found in storage")
_OF_A_CAPTURE = "captur"  # "operation not permitted when stream is capturing", cudaErrorStreamCaptureInvalidated, ...
# Triton's cache cannot be written; and what reading a damaged entry raises.
_OF_THE_CACHE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
_DAMAGED = (json.JSONDecodeError, UnicodeDecodeError)


class _Counted(threading.local):
    """How many launches of this thread fell back to plain PyTorch, and the kernel whose failure caused the last one."""

    fallbacks = 0
    last_failed = ""


counted = _Counted()


class KernelFailed(RuntimeError):
    """`kernel` could not be compiled or launched. Nothing was computed; its outputs were not written."""

    left: list[int]  # for an optimizer step: indices of the parameters that were not updated

    def __init__(self, kernel: str, error: BaseException) -> None:
        text = str(error).strip().splitlines()
        self.kernel = kernel
        self.reason = f"{type(error).__name__}: {text[-1].strip()[:200] if text else 'without a message'}"
        super().__init__(f"{kernel} could not be compiled or launched ({self.reason})")


def is_of_the_kernel(error: Exception, device: torch.device) -> bool:
    """Whether compiling or launching failed, as opposed to the device, its memory, or the kernel's code in the interpreter.

    During the capture of a CUDA graph no error is attributed to the kernel, which may work outside of the capture.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, InterpreterError, KernelFailed)):
        return False
    others = (*_OF_THE_DEVICE, *_OF_THE_CONTEXT, *_OF_CHECKPOINTING, _OF_A_CAPTURE)
    return not (_mentions(error, *others) or _is_capturing(device))


def advise(kernel: str, error: Exception, device: torch.device) -> None:
    """Add advice to an error that is not the kernel's, where there is any."""
    if _mentions(error, _OF_A_CAPTURE) or _is_capturing(device):
        error.add_note(
            f"fastbert: the launch of {kernel} failed inside a CUDA graph capture. No kernel is disabled by it. Run the "
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
    """Whether the device's current stream is capturing a CUDA graph; called only after a launch has failed."""
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        # The default stream cannot be queried while another stream captures, and no stream without a context. On the CPU there
        # may be no stream.
        return device.type == "cuda"


def move_cache(error: Exception) -> bool:
    """Move Triton's cache to a temporary folder, once, if `error` says that it is of no use. Returns whether it moved."""
    useless = isinstance(error, _DAMAGED)
    if isinstance(error, OSError):
        # A file that is gone may also be a compiler.
        deleted = error.errno == errno.ENOENT and str(error.filename).startswith(str(triton.knobs.cache.dir))
        useless = deleted or error.errno in _OF_THE_CACHE
    lacks_binary = isinstance(error, KeyError) and "Unknown key" in str(error)  # Triton's, for a file gone from an entry
    if not (useless or lacks_binary) or move_cache.folder:
        return False
    move_cache.folder = tempfile.TemporaryDirectory(prefix="fastbert-triton-")  # removed when the process ends
    logger.warning(
        "Triton's cache %s cannot be used (%s: %s): kernels are compiled into a temporary folder, again in each process. "
        "Set TRITON_CACHE_DIR to a folder that can be written, or delete a damaged cache.",
        triton.knobs.cache.dir,
        type(error).__name__,
        error,
    )
    triton.knobs.cache.dir = move_cache.folder.name
    return True


move_cache.folder = None


def record(failure: KernelFailed) -> None:
    """Store why a kernel is not used, and log it if it is new."""
    if failure.kernel not in reasons:
        reasons[failure.kernel] = failure.reason
        logger.warning(
            "fastbert: %s. Plain PyTorch computes its part from now on: the results are right, the speed is not. "
            "Please report this line together with what the command `fastbert env` prints.",
            failure,
            exc_info=failure.__cause__,
        )


def reset() -> None:
    """Forget all failures, so that every kernel is tried again."""
    reasons.clear()
    _failed.clear()


def or_plain(twin: Callable[..., Any], after: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Decorate a launcher with its fallback: once one of its kernels has failed, `twin` receives its arguments.

    `after` is the launcher whose output this one reads: if that launcher fell back, so does this one. float64 on a GPU always
    goes to the twin, without counting as a failure: kernels compute float64 only in the interpreter, for gradcheck.
    """

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def launched(*arguments: Any, **keywords: Any) -> Any:
            wide = is_float64_on_gpu(*arguments)
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
    """The tensors among a launcher's arguments, also those inside tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


def is_float64_on_gpu(*arguments: Any) -> bool:
    """Whether one of the arguments is a float64 tensor on a GPU, for which there is no kernel."""
    return any([x.dtype == torch.float64 and x.is_cuda for x in tensors(arguments)])


def _count(kernel: str) -> None:
    counted.fallbacks, counted.last_failed = counted.fallbacks + 1, kernel
